"""The entry `proof`: what a person says about the proofs, in place of what adaptc would choose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from adaptc.spec.diagnostics import fault, invalid
from adaptc.spec.part import Many, Part, PathText

Size = Annotated[int, Field(ge=1)]


class ProofEntry(Part):
    """The inputs that proofs run on, and the error that they allow."""

    inputs: PathText | None = Field(
        None, description="rows that proofs run on first: a .jsonl or .safetensors file of inputs"
    )
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the relative error allowed, in place of what follows from the dtype and its rounding",
    )
    shapes: Many[dict[str, Size]] = Field(
        (), description="sizes of the named dimensions for random inputs, such as [{batch: 2, seq: 64}]"
    )

    @model_validator(mode="after")
    def _says_something(self) -> ProofEntry:
        if not self.model_fields_set:
            raise invalid(
                fault(
                    "expected inputs, tolerance or shapes, such as proof: {inputs: rows.jsonl}", at_key=True
                )
            )
        return self
