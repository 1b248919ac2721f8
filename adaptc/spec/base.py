"""The entry `base` of a spec, the model to adapt, and `inputs`, what that model takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, StringConstraints, model_validator
from pydantic_core import InitErrorDetails

from adaptc.errors import got
from adaptc.inputs import DTYPES, InputSpec
from adaptc.spec.diagnostics import fault, invalid
from adaptc.spec.part import Part, PathText
from adaptc.spec.yaml_text import is_mapping

DEFAULT_TASK = "feature-extraction"
"""The task of a `model` that names none: the model without a head."""
PROXIED = "causal-lm"
"""The task of a model that can be proxy-tuned."""


class ProxyEntry(Part):
    """Two small models that steer the base: `logits = base + alpha (tuned - untuned)`, by Liu et al. 2024."""

    tuned: PathText = Field(
        description="a small model after its tuning: a Hugging Face directory, or a hub id"
    )
    untuned: PathText = Field(description="the same model before its tuning")
    alpha: float = Field(1.0, description="how strongly the base is steered")


class BaseEntry(Part):
    """The model to adapt: exactly one of `model`, `python` and `program`."""

    model: PathText | None = Field(None, description="a Hugging Face directory, or a hub id")
    task: str = Field(
        DEFAULT_TASK, description="the Auto class of `model`, by its task name, or sentence-embedding"
    )
    python: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")] | None = Field(
        None, description="a factory of one's own: pkg.module:function"
    )
    args: dict[str, Any] = Field({}, description="the arguments of the `python` factory")
    program: PathText | None = Field(None, description="a saved torch.export program")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = Field(
        None, description="dtype of the weights; the base's own if left out"
    )
    config: dict[str, Any] = Field(
        {}, description="overrides of a `model`'s config.json, such as num_labels: 3"
    )
    proxy: ProxyEntry | None = Field(
        None, description="proxy-tuning: small models of the same vocabulary that steer a causal-lm"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with a Hugging Face model")

    @model_validator(mode="after")
    def _one_kind(self) -> BaseEntry:
        given = [key for key in ("model", "python", "program") if getattr(self, key) is not None]
        if not given:
            raise invalid(fault("a base needs one of 'model', 'python' or 'program'", at_key=True))
        if len(given) > 1:
            message = f"a base has one of 'model', 'python' or 'program', and {given[0]!r} is given"
            raise invalid(*(fault(message, loc=(key,), at_key=True) for key in given[1:]))
        if self.args and self.python is None:
            raise invalid(fault("only a 'python' base takes arguments", loc=("args",), at_key=True))
        if self.config and self.model is None:
            raise invalid(fault("only a 'model' base has a config", loc=("config",), at_key=True))
        if self.proxy and (self.model is None or self.task != PROXIED):
            raise invalid(
                fault(f"only a 'model' of task {PROXIED} is proxy-tuned", loc=("proxy",), at_key=True)
            )
        if self.task != DEFAULT_TASK and self.model is None:
            raise invalid(fault("only a 'model' base has a task", loc=("task",), at_key=True))
        return self


def _inputs(texts: object) -> dict[str, InputSpec]:
    if not is_mapping(texts):
        raise invalid(fault(f"expected a mapping, got {got(texts)}"))
    inputs: dict[str, InputSpec] = {}
    faults: list[InitErrorDetails] = []
    for name, text in texts.items():
        try:
            inputs[name] = text if isinstance(text, InputSpec) else InputSpec.parse(str(name), text)
        except ValueError as error:
            faults.append(fault(str(error), loc=(name,)))
    if faults:
        raise invalid(*faults)
    return inputs


InputText = Annotated[str, StringConstraints(pattern=r"^\s*(" + "|".join(DTYPES) + r")\s*\[.*\]\s*$")]
Inputs = Annotated[
    dict[str, InputSpec],
    PlainValidator(_inputs, json_schema_input_type=dict[str, InputText | list[Any]]),
    PlainSerializer(lambda inputs: {name: spec.stated for name, spec in inputs.items()}),
]
"""The inputs of the base, by name: in a spec a text such as `int64[batch, seq]`, or the value of a constant."""
