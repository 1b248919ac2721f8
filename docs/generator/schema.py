"""The reference of the spec and of options, from the JSON Schema that adaptc itself prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES
from adaptc.spec.spec import schema_text

Schema = Mapping[str, Any]
ALIAS = "another spelling of "
SIZES = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
SECTIONS = (
    ("base", "BaseEntry"),
    ("target", "LayerTarget"),
    ("adapt, a trained adapter", "AdapterEntry"),
    ("budget", "QuantizeBudget"),
    ("proof", "ProofEntry"),
)
"""The mappings of a spec that are no method, no scheme and no format of `emit`."""


@cache
def schema() -> Schema:
    """The schema of a spec."""
    return json.loads(schema_text())


@cache
def entries() -> dict[str, Schema]:
    """Name -> the schema of its entry, for every method, every scheme, and every format of `emit`."""
    named = {}
    for definition in schema()["$defs"].values():
        for key in ("method", "format"):
            constant = definition["properties"].get(key, {}).get("const")
            if constant is not None:
                named[constant] = definition
    return named


def shared(names: Iterator[str] | list[str]) -> set[str]:
    """The options that all of some entries have."""
    return set.intersection(*(set(entries()[name]["properties"]) for name in names))


def table(definition: Schema, leave_out: set[str] | None = None) -> str:
    """The options of a mapping as a table; other spellings stand beside the one they mean."""
    properties = {k: v for k, v in definition["properties"].items() if k not in (leave_out or set())}
    spellings: dict[str, list[str]] = {}
    for name, option in properties.items():
        if (option.get("description") or "").startswith(ALIAS):
            spellings.setdefault(option["description"].removeprefix(ALIAS), []).append(name)
    also = {name for names in spellings.values() for name in names}
    rows = [
        _row(name, option, spellings.get(name, []), definition)
        for name, option in properties.items()
        if name not in also
    ]
    if not rows:
        return "It has no options of its own.\n"
    return (
        "\n".join(["| option | takes | if left out | what it is |", "| --- | --- | --- | --- |", *rows])
        + "\n"
    )


def _row(name: str, option: Schema, spellings: list[str], definition: Schema) -> str:
    text = option.get("description") or _inner(option).get("description") or ""
    text += f" (also read as {', '.join(f'`{s}`' for s in spellings)})" if spellings else ""
    required = name in definition.get("required", ())
    default = (
        "required"
        if required
        else f"`{json.dumps(option['default'])}`"
        if option.get("default") is not None
        else ""
    )
    return f"| `{name}` | {_escaped(_type(option))} | {default} | {_escaped(_linked(text))} |"


def _inner(option: Schema) -> Schema:
    """The one kind of value that an optional value has."""
    kinds = [kind for kind in option.get("anyOf", ()) if kind.get("type") != "null"]
    values = option.get("additionalProperties")
    return kinds[0] if len(kinds) == 1 else values if isinstance(values, dict) else option


def _type(option: Schema) -> str:
    if "const" in option:
        return f"`{option['const']}`"
    if "enum" in option:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in option["enum"])
    if "$ref" in option:
        return "a mapping"
    kinds = [
        _type(kind) for kind in option.get("anyOf", option.get("oneOf", ())) if kind.get("type") != "null"
    ]
    if kinds:
        return " or ".join(dict.fromkeys(kinds))
    if option.get("type") == "array":
        items = _type(option["items"]) if option.get("items") else "values"
        return f"list of {items}"
    if option.get("type") == "object":
        return "a mapping"
    sizes = " ".join(f"{sign} {option[key]}" for key, sign in SIZES.items() if key in option)
    return f"{option.get('type', 'any')} {sizes}".strip()


def _linked(text: str) -> str:
    return text[:1].upper() + text[1:]


def _escaped(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)


def spec_page() -> str:
    """The reference of the spec's keys."""
    whole = schema()
    formats = sorted(
        {e["properties"]["format"]["const"] for e in whole["$defs"].values() if "format" in e["properties"]}
    )
    lines = [
        "# The spec",
        "",
        "Made from the JSON Schema that `adaptc schema` prints. Give that file to your editor, and it completes and",
        "checks specs.",
        "An unknown key is an error that shows the file, the line and the nearest key there is.",
        "",
        "## A whole spec",
        "",
        table(whole),
    ]
    for title, definition in SECTIONS:
        lines += [
            f"## {title}",
            "",
            whole["$defs"][definition].get("description", ""),
            "",
            table(whole["$defs"][definition]),
        ]
    method_names, scheme_names = sorted(METHODS), sorted(SCHEMES)
    lines += [
        "## adapt, a method",
        "",
        "What every entry under `adapt` takes. The other options are the method's own:",
        "see [methods](methods/index.md).",
        "",
        table({**entries()["lora"], "properties": _only("lora", shared(method_names) | {"name"})}),
        "## quantize, a scheme",
        "",
        "What every entry under `quantize` takes. The other options are the scheme's own:",
        "see [schemes](schemes/index.md).",
        "",
        table({**entries()["nf4"], "properties": _only("nf4", shared(scheme_names))}),
        "## emit",
        "",
        "What is written. Paths are relative to the spec file.",
        "",
    ]
    for name in formats:
        definition = entries()[name]
        lines += [f"### emit: {name}", "", definition.get("description", ""), "", table(definition)]
    return "\n".join(lines)


def _only(name: str, keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in entries()[name]["properties"].items() if key in keys}
