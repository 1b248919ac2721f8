"""The proof that onnxruntime-genai generates what a graph does: every token has the graph's largest logit.

The graph without a cache reads each text together with the tokens that were generated, so that it runs once a text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.artifacts.program import ProgramArtifact
from adaptc.compiler.program import Program
from adaptc.compiler.proof.differences import scale
from adaptc.compiler.proof.proof import Proof
from adaptc.emit.genai.decoder import IDS, MASK, POSITIONS, Served
from adaptc.emit.onnx.adapter_file import write_adapter
from adaptc.errors import ProofError
from adaptc.generation.genai import PACKAGE, GenaiModel
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Interpreter
from adaptc.weights import seeded

NOT_INSTALLED = "not run: onnxruntime-genai is not installed: pip install 'adaptc[serve]'"
LENGTHS = (1, 5, 17)
"""The tokens of the texts that are continued."""
NEW = 8
"""The tokens that follow each. Chosen as few, since each is a run of the model."""
ALONE, TOGETHER = "one by one", "in one batch"
"""How the texts are continued."""
HIDDEN = 64
"""The hidden tokens in `gaps_change_nothing`."""


@dataclass(frozen=True)
class Answers:
    """What onnxruntime-genai generated.

    Attributes:
        texts: the token ids of each text.
        answers: the tokens that followed it.
        sure: how many of these come before the first that nearly ties with another.
        together: whether the texts were continued in one batch too.
        sound: where an encoder hears sound: shape, dtype and seed of what it heard with each text; else None.
    """

    texts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    sure: Sequence[int]
    together: bool
    sound: tuple[Sequence[int], str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The answers as plain data."""
        return asdict(self)


def prove_greedy(
    program: Program,
    written: ProgramArtifact,
    decoder: Served,
    model: GenaiModel,
    padded: int,
    longest: int,
    adapter: str = "",
) -> Answers:
    """Prove that the likeliest tokens that onnxruntime-genai generates are those of the graph without a cache.

    A token's logit may be below the largest by twice the error that the program's own proof allows.

    Args:
        program: the compiled program.
        written: the program in the directory.
        decoder: how onnxruntime-genai sees it.
        model: the directory, loaded.
        padded: the most tokens that texts may have with their answers where they are one batch too, shorter ones padded
            behind.
        longest: the most tokens of a text.
        adapter: the name of the adapter that the model has; "" without.

    Raises:
        ProofError: another token is likelier.
    """
    special = {model.pad, *model.ends}
    lengths = [length for length in LENGTHS if length + NEW <= longest] or [1]
    texts = [_text(decoder.vocabulary, special, length, program.spec.seed) for length in lengths]
    together = max(map(len, texts)) + NEW <= padded
    about = _about(decoder, program.spec.seed)
    sounds = _sounds(about, len(texts))
    ways = _generated(model, texts, together, sounds)
    allowed = 2 * written.proof.tolerance
    sure: list[int] = []
    for way, answers in ways.items():
        judged = _judged(written.computes, decoder, texts, answers, sounds)
        title = ", ".join(word for word in ("genai", adapter, "greedy", way) if word)
        proof = _proof(title, texts, answers, judged, allowed)
        program.proofs.keep(proof)
        sure = sure or [_sure(each, allowed) for each in judged]
    return Answers(texts, ways[ALONE], sure, together, about)


def prove_swapped(
    program: Program,
    written: ProgramArtifact,
    decoder: Served,
    model: GenaiModel,
    padded: int,
    longest: int,
) -> None:
    """Prove the tokens with each adapter that the program takes, as `prove_greedy` does, and the base's after them.

    Raises:
        ProofError: another token is likelier.
    """
    for name, each in written.alternatives.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.onnx_adapter"
            write_adapter(file, each.tensors, program.base_sha256)
            with_it = replace(written, computes=each.computes, proof=each.proof)
            prove_greedy(program, with_it, decoder, model.adapted(file), padded, longest, name)
    if written.alternatives:
        prove_greedy(program, written, decoder, model, padded, longest, "the base again")


def _generated(
    model: GenaiModel, texts: Sequence[Sequence[int]], together: bool, sounds: torch.Tensor | None
) -> dict[str, list[list[int]]]:
    """What follows some texts: way of generating -> the answer to each."""
    heard = _heard(sounds, len(texts))
    answers = [model.greedy([text], NEW, sound)[0] for text, sound in zip(texts, heard, strict=True)]
    return {ALONE: answers} | ({TOGETHER: model.greedy(texts, NEW, sounds)} if together else {})


def _about(decoder: Served, seed: int) -> tuple[list[int], str, int] | None:
    """What an encoder hears, see `Answers`."""
    if decoder.encoder is None:
        return None
    features = decoder.encoder.features
    return [int(size) for size in features.dims[1:]], features.dtype, seed


def _sounds(about: tuple[Sequence[int], str, int] | None, count: int) -> torch.Tensor | None:
    """Random features of sound, for so many texts, see `Answers`."""
    if about is None:
        return None
    shape, dtype, seed = about
    return torch.randn((count, *shape), generator=seeded(seed, "sound")).to(getattr(torch, dtype))


def _heard(sounds: torch.Tensor | None, count: int) -> list[torch.Tensor | None]:
    """What an encoder hears with each of so many texts: one of the sounds; None where there are none."""
    return [None if sounds is None else sounds[number, None] for number in range(count)]


def generated_again(answers: Mapping[str, Any] | str, directory: Path) -> str:
    """Compare what onnxruntime-genai generates now with what a manifest keeps, up to the first near tie.

    Args:
        answers: `Answers` as plain data, or why there are none.
        directory: the directory that is served.

    Returns:
        The result in words.

    Raises:
        ProofError: it generates other tokens.
    """
    if isinstance(answers, str):
        return f"onnxruntime-genai was {answers}"
    if find_spec(PACKAGE) is None:
        return NOT_INSTALLED
    recorded = Answers(**answers)
    sounds = _sounds(recorded.sound, len(recorded.texts))
    ways = _generated(GenaiModel(directory), recorded.texts, recorded.together, sounds)
    for way, again in ways.items():
        for text, old, new, count in zip(recorded.texts, recorded.answers, again, recorded.sure, strict=True):
            if old[:count] != new[:count]:
                raise ProofError(
                    f"onnxruntime-genai continues {len(text)} tokens {way} with {new}, and with {old} as compiled"
                )
    return f"onnxruntime-genai generates the same tokens, {', '.join(ways)}"


def _text(vocabulary: int, special: set[int], length: int, seed: int) -> list[int]:
    """A random text without tokens that end or pad one."""
    usual = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(usual), (length,), generator=seeded(seed, f"{length} tokens"))
    return [int(token) for token in usual[drawn]]


@dataclass(frozen=True)
class _Token:
    """A token that was generated, and the graph's logits of its place, over the largest of the text.

    Attributes:
        behind: how far its logit is below the largest one.
        ahead: how far the largest one is above the next.
    """

    behind: float
    ahead: float


def _judged(
    graph: Graph,
    decoder: Served,
    texts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    sounds: torch.Tensor | None,
) -> list[list[_Token]]:
    """Every token of the answers beside the logits of a graph."""
    rows = [[*text, *answer] for text, answer in zip(texts, answers, strict=True)]
    heard = _heard(sounds, len(texts))
    batches = {
        str(number): _batch(graph, decoder, row, sound=sound)
        for number, (row, sound) in enumerate(zip(rows, heard, strict=True))
    }
    logits = _logits(graph, decoder, batches)
    judged: list[list[_Token]] = []
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        values = logits[str(number)][0]
        largest = scale(values.flatten())
        places = values[len(text) - 1 : len(text) - 1 + len(answer)]
        best = places.topk(2).values
        chosen = places.gather(1, torch.tensor(answer)[:, None])
        behind, ahead = (best[:, :1] - chosen) / largest, (best[:, 0] - best[:, 1]) / largest
        judged.append([_Token(float(b), float(a)) for b, a in zip(behind, ahead, strict=True)])
    return judged


def _logits(graph: Graph, decoder: Served, batches: Mapping[str, Batch]) -> dict[str, torch.Tensor]:
    """The logits of some batches, in float32 at least."""
    run = Interpreter(graph, torch.float32).on(batches).only([decoder.logits])
    outcomes: dict[str, torch.Tensor] = {}
    for label, outcome in run.outcomes.items():
        if isinstance(outcome, Exception):
            raise ProofError(f"the graph does not take a text that was generated: {outcome}") from outcome
        outcomes[label] = outcome[0]
    return outcomes


def _batch(
    graph: Graph,
    decoder: Served,
    row: Sequence[int],
    hidden: Sequence[int] = (),
    sound: torch.Tensor | None = None,
) -> Batch:
    """One text, and what an encoder hears with it, as the inputs of the graph without a cache.

    Positions count what is not hidden. The program may count them itself where the graph takes them.
    """
    ids = torch.tensor([row])
    seen = torch.ones_like(ids)
    seen[0, list(hidden)] = 0
    values = {IDS: ids, MASK: seen, POSITIONS: (seen.cumsum(1) - 1).clamp(min=0)}
    counted = {spec.name: values[POSITIONS] for spec in graph.inputs if spec.counted}
    heard = {} if decoder.encoder is None or sound is None else {decoder.encoder.features.name: sound}
    return {**counted, **heard, **{name: values[usual] for usual, name in decoder.inputs.items()}}


def _sure(tokens: Sequence[_Token], allowed: float) -> int:
    return next((n for n, token in enumerate(tokens) if token.ahead <= allowed), len(tokens))


def _proof(
    name: str,
    texts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    judged: Sequence[Sequence[_Token]],
    allowed: float,
) -> Proof:
    """The proof, which held.

    Raises:
        ProofError: a token is none of the likeliest.
    """
    for text, answer, tokens in zip(texts, answers, judged, strict=True):
        for place, token in enumerate(tokens):
            if not token.behind <= allowed:
                raise ProofError(
                    f"the proof failed: {name}: token {place + 1} behind {len(text)} tokens is {answer[place]}, whose "
                    f"logit is {token.behind:.1e} below the largest, relative to the largest of the text, "
                    f"{allowed:.1e} allowed"
                )
    every = [token for tokens in judged for token in tokens]
    ties = sum(token.behind > 0 for token in every)
    notes = [f"{len(every)} tokens"] + ([f"{ties} of them between near ties"] if ties else [])
    worst = max(token.behind for token in every)
    shapes = tuple(f"{len(text)} tokens" for text in texts)
    return Proof(name, worst, worst, allowed, shapes, notes=tuple(notes))


def gaps_change_nothing(program: Program, written: ProgramArtifact, decoder: Served, longest: int) -> bool:
    """Whether hidden tokens in the middle of a text change nothing behind them.

    onnxruntime-genai pads shorter texts behind, and goes on behind that. It changes nothing where positions are an
    input, or none count.
    """
    if MASK not in decoder.inputs:
        return False
    text = _text(decoder.vocabulary, set(), LENGTHS[1], program.spec.seed)
    count = min(HIDDEN, longest - len(text))
    gap = [*text[:2], *[text[0]] * count, *text[2:]]
    graph = written.file.unrounded or written.computes
    hidden = range(2, 2 + count)
    batches = {"whole": _batch(graph, decoder, text), "gap": _batch(graph, decoder, gap, hidden)}
    logits = _logits(graph, decoder, batches)
    whole, apart = logits["whole"][:, 2:], logits["gap"][:, 2 + count :]
    return float((whole - apart).abs().max()) <= written.proof.tolerance * scale(whole.flatten())
