"""The registries as rows: what `adaptc methods`, `schemes` and `passes` print."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptc.methods.method import METHODS, summary
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.catalog import load_passes
from adaptc.spec.part import option_names


def method_rows() -> list[dict[str, Any]]:
    """One row for each method.

    Returns:
        Rows with the keys `method`, `equation`, `sits on` (kinds of site), `options` and `PEFT` (PEFT's name for it).
    """
    return [
        {
            "method": name,
            "equation": summary(cls),
            "sits on": ", ".join(sorted(cls.kinds)),
            "options": ", ".join(option_names(cls)) or "none",
            "PEFT": (cls.peft.type or cls.peft.joins or "") if cls.peft else "",
        }
        for name, cls in sorted(METHODS.items())
    ]


def scheme_rows() -> list[dict[str, Any]]:
    """One row for each scheme.

    Returns:
        Rows with the keys `scheme`, `equation`, `stores` (kinds of site), `options` with their defaults, and `chooses
        by`, what decides the codes.
    """
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
    """One row for each pass.

    Returns:
        Rows with the keys `pass`, `does`, `takes` (the stages of graphs it accepts) and `leaves` (the stage after it).
    """
    return [
        {
            "pass": name,
            "does": next(iter((cls.__doc__ or "").strip().splitlines()), ""),
            "takes": ", ".join(sorted(cls.takes)),
            "leaves": cls.leaves or "as it was",
        }
        for name, cls in sorted(load_passes().items())
    ]
