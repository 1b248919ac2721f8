"""A page for every method and every scheme, and the lists of methods, schemes and passes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from adaptc.methods.method import METHODS, summary
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.catalog import load_passes
from docs.generator import schema
from docs.generator.equations import parts, typeset

ROOT = Path(__file__).parents[2]
KINDS = {
    "linear": "linear layers, slices of fused weights and GPT-2's transposed layers",
    "conv": "convolutions",
    "embedding": "embeddings",
    "experts": "fused experts",
    "parameter": "single parameters, such as biases and gains",
    "sub-layer": "attentions and feed-forwards",
    "attention": "attentions",
    "input": "the model's input tokens",
}
DRAWINGS = {"sub-layer": "activation", "attention": "attention", "input": "input", "parameter": "parameter"}
"""Kind of site -> the drawing of where a method sits, `docs/assets/site-….svg`; a weight elsewhere."""
INSERTS = ("insert-", "quantize-")


def pages() -> dict[str, str]:
    """Path in the site -> text."""
    made = {
        "reference/methods/index.md": _index("Methods", "adapt", METHODS),
        "reference/schemes/index.md": _index("Schemes", "quantize", SCHEMES),
        "reference/passes.md": passes_page(),
    }
    common = schema.shared(list(METHODS)) | {"name", "target"}
    made |= {f"reference/methods/{name}.md": _page(name, cls, common) for name, cls in METHODS.items()}
    common = schema.shared(list(SCHEMES))
    made |= {f"reference/schemes/{name}.md": _page(name, cls, common) for name, cls in SCHEMES.items()}
    return made


def _index(title: str, key: str, registry: Any) -> str:
    rows = [
        f"| [`{name}`]({name}.md) | {', '.join(sorted(cls.kinds))} | {_first(cls)} |"
        for name, cls in sorted(registry.items())
    ]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"What `method:` may be in an entry under `{key}`. One page each: the equation, the options and",
            "their defaults, a spec.",
            *(["Measured beside PEFT in [the table](../../methods.md)."] if key == "adapt" else []),
            "",
            "| name | sits on | equation |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def _page(name: str, cls: Any, common: set[str]) -> str:
    text, line = inspect.cleandoc(cls.__doc__ or ""), summary(cls)
    told = parts(line)
    body = text[len(line) :].strip() if text.startswith(line) else text.partition("\n\n")[2]
    lines = [f"# {name}", "", *(f"{typeset(equation, block=True)}\n" for equation in told.equations)]
    if told.where:
        lines += ["where " + ", ".join(typeset(formula) for formula in told.where) + ".", ""]
    lines += [f"{note[:1].upper()}{note[1:]}." for note in told.notes] + [""]
    lines += [f"{told.source}.", ""] if told.source else []
    lines += [body, "", f"![where {name} sits](../../assets/site-{_drawing(cls)}.svg){{ .site }}", ""]
    lines += [f"It sits on {_sits(cls)}."]
    lines += [_peft(cls), ""] if name in METHODS else [""]
    lines += ["## In a spec", "", f"The file `specs/{name}.yaml`:", "", "```yaml", _spec(name), "```", ""]
    key = "adapt" if name in METHODS else "quantize"
    lines += ["## Options", "", schema.table(schema.entries()[name], common | {"method"}), ""]
    anchor = "adapt-a-method" if key == "adapt" else "quantize-a-scheme"
    lines += [f"What every entry takes besides, such as `target`, is in [the spec](../spec.md#{anchor})."]
    return "\n".join(lines)


def _spec(name: str) -> str:
    return (ROOT / "specs" / f"{name}.yaml").read_text().strip()


def _first(cls: Any) -> str:
    told = parts(summary(cls))
    return " ".join(typeset(equation) for equation in told.equations)


def _sits(cls: Any) -> str:
    return ", ".join(KINDS[kind] for kind in KINDS if kind in cls.kinds)


def _drawing(cls: Any) -> str:
    return next((DRAWINGS[kind] for kind in DRAWINGS if cls.kinds <= {kind}), "weight")


def _peft(cls: Any) -> str:
    form = cls.peft
    if form is None:
        return "PEFT has no such method; checkpoints are in adaptc's own format."
    if form.type:
        return f"PEFT calls it `{form.type}`; its checkpoints are read and written."
    return f"PEFT keeps it as `{form.joins}` beside another method."


def passes_page() -> str:
    """The passes that a spec may name under `passes`."""
    rows = [
        f"| `{name}` | {_line(cls)} | {', '.join(sorted(cls.takes))} | {cls.leaves or 'as it was'} |"
        for name, cls in sorted(load_passes().items())
        if not name.startswith(INSERTS)
    ]
    return "\n".join(
        [
            "# Passes",
            "",
            "What may stand under `passes` in a spec. `insert` means all entries of `adapt`, `quantize` all of",
            "`quantize`; `insert-NAME` and `quantize-NAME` are there for every [method](methods/index.md) and every",
            "[scheme](schemes/index.md). A graph is at one stage at a time: a pass says which it takes, and which it",
            "leaves ([architecture](../architecture.md)).",
            "",
            "| pass | does | takes | leaves |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _line(cls: Any) -> str:
    first = next(iter(inspect.cleandoc(cls.__doc__ or "").split("\n\n")), "")
    return re.sub(r"\s+", " ", first).replace("|", r"\|").rstrip(";")
