"""The registries as rows: what `adaptc methods`, `schemes` and `passes` print, and all that is known of one name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sized
from typing import Any, cast

from pydantic import TypeAdapter

from adaptc.errors import Problem, SpecError, unknown
from adaptc.methods.method import METHODS, Method, summary
from adaptc.quantization.scheme import SCHEMES
from adaptc.spec.part import option_names
from adaptc.spec.yaml_text import is_list

PLACES = {
    "linear": "linear layers",
    "conv": "convolutions",
    "embedding": "embeddings",
    "experts": "fused experts",
    "parameter": "any parameter of a module",
    "sub-layer": "the outputs of sub-layers",
    "attention": "the keys and values of attentions",
    "input": "the embedded input",
    "head": "the output head, or an output",
}
"""Kind of site -> where that is, in words."""
ORDERED = tuple(PLACES)


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
    from adaptc.rewriter.catalog import load_passes  # imports torch, which the other listings do without

    return [
        {
            "pass": name,
            "does": next(iter((cls.__doc__ or "").strip().splitlines()), ""),
            "takes": ", ".join(sorted(cls.takes)),
            "leaves": cls.leaves or "as it was",
        }
        for name, cls in sorted(load_passes().items())
    ]


def described(name: str) -> dict[str, Any]:
    """All that a spec's author needs of one method.

    Returns:
        `method`, `equation`, `about` (the paper, what is special), `sits on`, `starts as` before any training, `when
        folded`, `PEFT` (its name for it), and `options`: rows with `option`, `takes`, `default`, `about` and
        `also written`.

    Raises:
        SpecError: there is no such method.
    """
    if name not in METHODS:
        raise SpecError([Problem(unknown("method", name, sorted(METHODS)), file="adaptc methods")])
    cls = METHODS[name]
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    weight = {"weight"} <= cls.expressions.keys()
    return {
        "method": name,
        "equation": " ".join(first.split("  ")).strip(),
        "about": " ".join(rest.split()),
        "sits on": ", ".join(PLACES[kind] for kind in ORDERED if kind in cls.kinds),
        "starts as": "the base" if cls.identity_at_init else "something else than the base",
        "when folded": "nothing is left" if weight else "it stays in the model",
        "PEFT": (cls.peft.type or cls.peft.joins or "") if cls.peft else "",
        "options": option_rows(cls),
    }


def option_rows(cls: type[Method[Any]]) -> list[dict[str, str]]:
    """The options of a method: rows with `option`, `takes`, `default`, `about` and `also written`."""
    properties: Mapping[str, Any] = TypeAdapter(cls).json_schema()["properties"]
    spelled: dict[str, list[str]] = {}
    for spelling, option in cls.aliases.items():
        spelled.setdefault(option, []).append(spelling)
    rows: list[dict[str, str]] = []
    for field in dataclasses.fields(cast("Any", cls)):
        schema = properties[field.name]
        rows.append(
            {
                "option": field.name,
                "takes": _type(schema),
                "default": _default(field),
                "about": str(schema.get("description", "")),
                "also written": ", ".join(spelled.get(field.name, ())),
            }
        )
    return rows


def _type(schema: Mapping[str, Any]) -> str:
    """What an option takes, in a few words: `int > 0`, `true or false`, `one of gaussian, pissa`."""
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(_shown, schema.get("enum", [schema.get("const")])))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"]))
    names = {
        "integer": "int", "number": "float", "boolean": "true or false", "string": "text", "null": "nothing",
        "array": "a list", "object": "a mapping by layer",
    }  # fmt: skip
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return ", ".join([names.get(str(schema.get("type")), "a value"), *limits])


def _default(field: dataclasses.Field[Any]) -> str:
    """The default of an option as a spec would write it; `required` where there is none."""
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else _shown(field.default_factory())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, Sized) and not isinstance(value, str) and not len(value)):
        return "none"
    if is_list(value):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
