"""The registries as rows, for the command line and the docs."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptc.methods.method import METHODS, summary
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.catalog import load_passes


def method_rows() -> list[dict[str, Any]]:
    """A row a method: name, equation, the sites it sits on, its options, PEFT's name for it."""
    return [
        {
            "method": name,
            "equation": summary(cls),
            "sits on": ", ".join(sorted(cls.kinds)),
            "options": ", ".join(f.name for f in dataclasses.fields(cls)) or "none",  # type: ignore[arg-type]
            "PEFT": (cls.peft.type or cls.peft.joins or "") if cls.peft else "",
        }
        for name, cls in sorted(METHODS.items())
    ]


def scheme_rows() -> list[dict[str, Any]]:
    """A row a scheme: name, equation, the sites whose weights it stores, its options with their defaults."""
    return [
        {
            "scheme": name,
            "equation": summary(cls),
            "stores": ", ".join(sorted(cls.kinds)),
            "options": ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls)) or "none",
            "chooses by": "the layer's inputs (calibration)" if cls.calibrated else "the weight",
        }
        for name, cls in sorted(SCHEMES.items())
    ]


def pass_rows() -> list[dict[str, Any]]:
    """A row a pass: name, what it does, the stages it takes, the stage it leaves."""
    return [
        {
            "pass": name,
            "does": next(iter((cls.__doc__ or "").strip().splitlines()), ""),
            "takes": ", ".join(sorted(cls.takes)),
            "leaves": cls.leaves or "as it was",
        }
        for name, cls in sorted(load_passes().items())
    ]
