"""The table of decoders: what each writes with a cache, in every way, beside what it writes without one.

`python -m benchmarks.decoder_table` writes docs/decoders.md; with names of decoders those alone are run, anew. A run that
was cut off goes on where it stopped: its outcomes are in build/decoders.jsonl. It ends with exit code 1 if a cell is
not right.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin

import adaptc
from adaptc.compiler.artifacts import emit_all
from adaptc.compiler.generation import Generator
from adaptc.errors import AdaptcError
from adaptc.spec.spec import load
from benchmarks.decoder_models import LENGTHS, LONGEST, Adapted, Model, adapted, model, names
from benchmarks.decoder_outcomes import KINDS, REFERENCE, Cell, Outcome, compared, write
from benchmarks.decoder_texts import Text, Write, by_genai, by_generate, by_onnx, without_cache
from benchmarks.process import quiet
from benchmarks.table import versions

LOG = Path(__file__).parents[1] / "build/decoders.jsonl"
ANY = "texts of any lengths"
"""What a manifest of onnxruntime-genai says where a batch may hold any texts."""


def outcomes(one: Model, kinds: Sequence[str] = KINDS) -> Iterator[Outcome]:
    """What becomes of a decoder, adapted in each way."""
    with tempfile.TemporaryDirectory(prefix="adaptc-decoders-") as folder:
        made: dict[str, Adapted] = {}
        for kind in kinds:
            source, _, how = kind.partition(" ")
            try:
                if source not in made:
                    made = {source: adapted(one, source, Path(folder))}
                yield Outcome(one.name, kind, cells(one, made[source], how or "folded", Path(folder) / kind))
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
    graph = made.compiled.folded_graph() if adapters == "folded" else made.compiled.live_graph()
    inputs = [spec.name for spec in graph.inputs]
    module = made.compiled.fold() if adapters == "folded" else made.compiled.module.eval()
    alone = [[number] for number in range(len(one.prompts))]
    want = dict(enumerate(text for row in alone for text in without_cache(module, inputs)(one, row)))
    generator = Generator(graph, made.compiled.base.source)
    unused = next(token for token in range(3, LONGEST) if not any(token in t.tokens for t in want.values()))
    served = {"context_length": LONGEST, "eos_token_id": unused}
    emitted = partial(written, made.compiled, adapters=adapters, round_activations=False)
    ways: dict[str, Callable[[], tuple[Write, str]]] = {
        "torch": lambda: (by_generate(generator.generate), ""),
        "onnx standard": lambda: emitted(work / "standard.onnx", cache=True, attention="standard"),
        "onnx gqa": lambda: emitted(work / "gqa.onnx", cache=True, attention="gqa"),
        "genai": lambda: emitted(work / "serve", **served),
    }
    found = {REFERENCE: _theirs(one, made.theirs, want, alone)}
    return found | {way: _cell(one, write_of, want) for way, write_of in ways.items()}


def _theirs(one: Model, theirs: Any, want: Mapping[int, Text], alone: Sequence[Sequence[int]]) -> Cell:
    """What transformers writes, each text alone: PEFT counts the pads of a batch as positions."""
    if theirs is None:
        return Cell(note="PEFT has none")
    if one.family is None:
        writer = without_cache(theirs, [one.ids])
    elif hasattr(theirs, "peft_config") or one.name != "Whisper":
        writer = by_generate(theirs.generate)
    else:  # a method of its own takes recordings of any length apart
        writer = by_generate(partial(GenerationMixin.generate, theirs))
    try:
        return compared(want, [(row[0], writer(one, row)[0]) for row in alone])
    except Exception as error:
        return Cell(note=f"{type(error).__name__} in PEFT")


def written(
    compiled: adaptc.Compiled, path: Path, adapters: str, round_activations: bool, **options: Any
) -> tuple[Write, str]:
    """Emit what writes, and give it with what is to be known."""
    format = "onnx" if path.suffix else "genai"
    entry = {"format": format, "path": str(path), "adapters": adapters, **options}
    spec = load({"emit": [{**entry, "round_activations": round_activations}]})
    path.parent.mkdir(exist_ok=True)
    emit_all(compiled.program, spec.emit)
    manifest = json.loads(((path if path.is_dir() else path.parent) / "manifest.json").read_text())
    product = manifest["products"][path.name if path.suffix else "genai"]
    attention = product["attention"]
    why = {reason.split(";")[0].partition(": ")[2] for reason in attention["why"]}
    notes = [
        f"{form} attention, since {'; '.join(sorted(why))}"
        for form in ("standard", "plain")
        if why and attention[form]
    ]
    if product.get("batches", ANY) != ANY:
        notes.append("texts one by one")
    return by_onnx(path) if path.suffix else by_genai(path), "; ".join(notes)


def _cell(one: Model, way: Callable[[], tuple[Write, str]], want: Mapping[int, Text]) -> Cell:
    try:
        writer, note = way()
    except AdaptcError as error:
        return Cell(refused=" ".join(str(error).split("\n")[0].split()))
    batches = [[n] for n in want] if "one by one" in note else one.batches
    pairs = [pair for batch in batches for pair in zip(batch, writer(one, batch), strict=True)]
    return compared(want, pairs, note)


def read(lines: Sequence[str]) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a log; of several of one decoder and kind the last."""
    found: dict[tuple[str, str], Outcome] = {}
    for values in map(json.loads, lines):
        cells = {way: Cell(**cell) for way, cell in values.pop("cells").items()}
        found[values["name"], values["kind"]] = Outcome(**values, cells=cells)
    return found


def main(chosen: Sequence[str]) -> int:
    """Run the decoders of these names, or all that have not been run, and write the page of all."""
    quiet()
    torch.set_num_threads(1)
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
        write(ordered, LENGTHS, versions())
    return 0 if all(outcome.holds for outcome in ordered if not chosen or outcome.name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
