"""The table of decoders: what each writes with a cache, in every way, beside what it writes without one.

`python -m benchmarks.decoder_table` writes docs/decoders.md; with names of decoders those alone are run, anew. A run
that was cut off goes on where it stopped: its outcomes are in build/decoders.jsonl. It ends with exit code 1 if a cell
is not right.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationMixin

import adaptc
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.generation import Generator
from adaptc.emit.genai.files import PROGRAM
from adaptc.errors import AdaptcError
from adaptc.ir.module import bind
from adaptc.spec.spec import load
from benchmarks.decoder_models import LENGTHS, LONGEST, Adapted, Model, adapted, model, names
from benchmarks.decoder_outcomes import KINDS, Cell, Outcome, compared, write
from benchmarks.decoder_texts import Text, Write, by_genai, by_generate, by_onnx, without_cache
from benchmarks.operations import build_once
from benchmarks.process import quiet
from benchmarks.table import versions

LOG = Path(__file__).parents[1] / "build/decoders.jsonl"
ANY = "texts of any lengths"
"""What a manifest says where onnxruntime-genai may be given a batch of any texts."""
ALONE = "texts one by one, since padding would fill the window or move positions"


def outcomes(one: Model, kinds: Sequence[str] = KINDS) -> Iterator[Outcome]:
    """What becomes of a decoder, adapted in each way."""
    with tempfile.TemporaryDirectory(prefix="adaptc-decoders-") as folder:
        made: dict[str, Adapted] = {}
        for kind in kinds:
            source, _, adapters = kind.partition(" ")
            work = Path(folder) / kind
            work.mkdir()
            try:
                if source not in made:
                    made = {source: adapted(one, source, Path(folder))}
                yield Outcome(one.name, kind, cells(one, made[source], adapters or "folded", work))
            except Exception as error:
                yield Outcome(one.name, kind, crash=f"crash: {type(error).__name__}: {error}".split("\n")[0])


def cells(one: Model, made: Adapted, adapters: str, work: Path) -> dict[str, Cell]:
    """What is written in each way.

    Args:
        one: the decoder.
        made: with an adaptation.
        adapters: `folded` or `live`.
        work: a folder for what is compiled.
    """
    compiled = made.compiled
    graph = compiled.folded_graph() if adapters == "folded" else compiled.live_graph()
    plain = without_cache(bind(graph).eval(), [spec.name for spec in graph.inputs])
    alone = [[number] for number in range(len(one.prompts))]
    want = {number: plain(one, [number])[0] for (number,) in alone}
    unused = next(token for token in range(3, LONGEST) if not any(token in t.tokens for t in want.values()))
    entry = {"adapters": adapters, "round_activations": False}
    serve, ends = work / "serve", {"context_length": LONGEST, "eos_token_id": unused}
    genai = _cell(one, want, lambda: emitted(compiled, "genai", serve, **entry, **ends))

    def onnx(form: str) -> tuple[Write, str]:
        return emitted(compiled, "onnx", work / f"{form}.onnx", cache=True, attention=form, **entry)

    def gqa() -> tuple[Write, str]:  # the program of the directory is that of `attention: gqa`
        program = serve / PROGRAM
        return (by_onnx(program), attention_note(product(serve))) if program.exists() else onnx("gqa")

    return {
        "Hugging Face": theirs(one, made.theirs, want),
        "torch": _cell(one, want, lambda: (by_generate(Generator(graph, compiled.base.source).generate), "")),
        "onnx standard": _cell(one, want, lambda: onnx("standard")),
        "onnx gqa": _cell(one, want, gqa),
        "genai": genai,
    }


def theirs(one: Model, module: Any, want: Mapping[int, Text]) -> Cell:
    """What transformers writes with the eager module, each text alone: PEFT counts the pads of a batch as positions."""
    if module is None:
        return Cell(note="PEFT has none")
    if one.family is None:
        writer = without_cache(module, [one.ids])
    elif one.name == "Whisper" and not hasattr(module, "peft_config"):
        # its own is for recordings of any length
        writer = by_generate(partial(cast("Any", GenerationMixin).generate, module))
    else:
        writer = by_generate(module.generate)
    try:
        return compared(want, [(number, writer(one, [number])[0]) for number in want])
    except Exception as error:
        return Cell(note=f"PEFT does not run it: {type(error).__name__}")


def emitted(compiled: adaptc.Compiled, format: str, path: Path, **options: Any) -> tuple[Write, str]:
    """Emit what writes; give it with what is to be known of it."""
    spec = load({"emit": [{"format": format, "path": str(path), **options}]})
    emit_all(compiled.program, spec.emit)
    if format == "onnx":
        return by_onnx(path), attention_note(product(path))
    about = product(path)
    notes = [attention_note(about), "" if about["batches"] == ANY else ALONE]
    return by_genai(path), "; ".join(note for note in notes if note)


def product(path: Path) -> dict[str, Any]:
    """What the manifest says of a program, or of a directory of onnxruntime-genai."""
    folder, name = (path, "genai") if path.is_dir() else (path.parent, path.name)
    return json.loads((folder / "manifest.json").read_text())["products"][name]


def attention_note(about: Mapping[str, Any]) -> str:
    """Which other form attention has than the one asked for, and why."""
    attention = about["attention"]
    reasons = sorted({reason.split(";")[0].partition(": ")[2] for reason in attention["why"]})
    forms = [form for form in ("standard", "plain") if attention[form] and reasons]
    return f"{' and '.join(forms)} attention: {'; '.join(reasons)}" if forms else ""


def _cell(one: Model, want: Mapping[int, Text], way: Callable[[], tuple[Write, str]]) -> Cell:
    """What is written in one way, beside what is without a cache."""
    try:
        writer, note = way()
        batches = [[number] for number in want] if ALONE in note else one.batches
        pairs = [pair for batch in batches for pair in zip(batch, writer(one, batch), strict=True)]
        return compared(want, pairs, note)
    except AdaptcError as error:
        return Cell(refused=" ".join(str(error).split("\n")[0].split()))
    except Exception as error:
        return Cell(tokens=1, error=math.inf, note=f"crash: {type(error).__name__}: {error}".split("\n")[0])


def read(lines: Sequence[str]) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a log by decoder and adaptation; of several the last."""
    found: dict[tuple[str, str], Outcome] = {}
    for values in map(json.loads, lines):
        cells = {way: Cell(**cell) for way, cell in values.pop("cells").items()}
        found[values["name"], values["kind"]] = Outcome(**values, cells=cells)
    return found


def main(chosen: Sequence[str]) -> int:
    """Run the decoders of these names, or all that have not been run, and write the page of all."""
    quiet()
    torch.set_num_threads(1)
    build_once()
    LOG.parent.mkdir(exist_ok=True)
    results = read(LOG.read_text().splitlines() if LOG.exists() else [])
    with LOG.open("a") as log:
        for name in chosen or names():
            kinds = [kind for kind in KINDS if chosen or (name, kind) not in results]
            for outcome in outcomes(model(name), kinds) if kinds else ():
                results[outcome.name, outcome.kind] = outcome
                print(json.dumps(asdict(outcome)), file=log, flush=True)
                shown = {way: cell.shown for way, cell in outcome.cells.items()}
                print(outcome.name, outcome.kind, outcome.crash or shown, flush=True)
    ordered = [results[name, kind] for name in names() for kind in KINDS if (name, kind) in results]
    if not chosen:
        write(ordered, names(), LENGTHS, versions())
    return 0 if all(outcome.holds for outcome in ordered if not chosen or outcome.name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
