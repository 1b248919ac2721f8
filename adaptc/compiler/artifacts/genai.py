"""The artifact of onnxruntime-genai: a directory, proved by the tokens that the package generates from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptc.compiler.artifacts.greedy_proof import (
    NOT_INSTALLED,
    gaps_change_nothing,
    prove_greedy,
    prove_swapped,
)
from adaptc.compiler.artifacts.onnx import Destination
from adaptc.compiler.artifacts.program import ProgramArtifact, write_program
from adaptc.compiler.artifacts.swap import write_swap_program
from adaptc.compiler.program import Program
from adaptc.emit.genai.config import Defaults, defaults_of, genai_config
from adaptc.emit.genai.decoder import WAY_OUT, Served, served, unserved
from adaptc.emit.genai.files import ENCODER, PROGRAM, tokens_of, write_config
from adaptc.emit.genai.sound import write_audio_processor
from adaptc.emit.genai.tokenizer import copy_tokenizer
from adaptc.emit.huggingface import fits_in_memory
from adaptc.emit.onnx.export import Wrote
from adaptc.errors import AdaptcError, Refusal, RefusedError
from adaptc.generation.genai import PACKAGE, GenaiModel, other_tokens
from adaptc.ir.graph import Graph
from adaptc.spec.emit import GenaiEmit
from adaptc.spec.spec import Spec

ANY, ONE = "texts of any lengths", "texts of one length"
"""What a batch may hold."""
WHY = (
    "the model has no attention_mask, counts positions itself, or attends to a window that padding would fill"
)
"""Why it may not hold any texts."""


@dataclass(frozen=True)
class GenaiArtifact:
    """A directory that was written and proved.

    Attributes:
        written: the program in it.
        about: what a manifest says of the directory, besides what it says of the program.
    """

    written: ProgramArtifact
    about: Mapping[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person must know who serves it."""
        notes: list[str] = []
        if not self.about["tokenizer"]:
            notes.append("the base has no tokenizer, so that the directory takes token ids alone")
        elif isinstance(self.about["tokenizer"], str):
            notes.append(self.about["tokenizer"])
        if self.about.get("audio_processor") is False:
            notes.append(
                "the base has no feature extractor as Whisper's, so that features of sound are given"
            )
        if self.about["batches"] != ANY:
            notes.append(f"a batch may hold {self.about['batches']}: {WHY}")
        left_out = ", ".join(f"{name}: {value}" for name, value in self.about["generation_left_out"].items())
        if left_out:
            notes.append(f"onnxruntime-genai has no {left_out}, which the base generates with")
        if isinstance(self.about["greedy"], str):
            notes.append(f"onnxruntime-genai was {self.about['greedy']}")
        return tuple(notes)


def write_genai(
    program: Program, entry: GenaiEmit, directory: Path, final: Path, wrote: Wrote | None = None
) -> GenaiArtifact:
    """Write a directory that onnxruntime-genai serves as it stands, and prove it.

    The program in it is proved as any with a cache. Where the package is installed, the tokens that it generates are
    held against the program's graph without a cache.

    Args:
        program: the compiled program.
        entry: the spec's entry.
        directory: the directory to write.
        final: where it will be put.
        wrote: called while the weights are written.

    Raises:
        RefusedError: onnxruntime-genai does not serve such a model.
        AdaptcError: it cannot be made or written, or a proof failed.
    """
    refusal = unserved(program.base)
    if refusal is not None:
        raise RefusedError([refusal])
    directory.mkdir(parents=True)
    try:
        to = Destination(directory / PROGRAM, final / PROGRAM, wrote, True, directory / ENCODER)
        write = write_swap_program if entry.adapters == "swap" else write_program
        written = write(program, entry.program, to)
    except RefusedError as error:  # what a cache cannot hold
        refusals = [
            Refusal(r.reason, r.nodes, (*r.notes, f"or without a cache: {WAY_OUT}")) for r in error.refusals
        ]
        raise RefusedError(refusals, error.source) from error
    assert written.file.signature is not None
    decoder = served(program.base, written.file.signature)
    defaults = defaults_of(program.base.source.pretrained)
    length, eos = _context_length(entry, defaults), _eos(entry, defaults, decoder)
    tokenizer = copy_tokenizer(program.base.source.pretrained, directory)
    config = genai_config(decoder, defaults, length, eos, written.file.has_one_buffer)
    write_config(directory, config)

    padded = _padded(program, written, decoder, length, defaults.window)
    unrun = _why_not_run(written)
    model = None if unrun else GenaiModel(directory, final)
    answers = prove_greedy(program, written, decoder, model, padded, length).to_json() if model else unrun
    if model:
        prove_swapped(program, written, decoder, model, padded, length)
    other = other_tokens(model, directory) if model and tokenizer else None
    about = {
        "batches": _batches(padded, length),
        "context_length": length,
        "tokenizer": other or tokenizer,
        "generation": config["search"],
        "generation_left_out": dict(defaults.left_out),
        "greedy": answers,
    }
    if decoder.encoder is not None:
        about["audio_processor"] = write_audio_processor(directory)
    return GenaiArtifact(written, about)


def _padded(
    program: Program, written: ProgramArtifact, decoder: Served, length: int, window: int | None
) -> int:
    """The most tokens that texts of several lengths may have in one batch with their answers; 0 if that takes none."""
    if not gaps_change_nothing(program, written, decoder, length):
        return 0
    return min(length, window or length)


def _batches(padded: int, length: int) -> str:
    """What a batch may hold, in words."""
    if padded == 0:
        return ONE
    return ANY if padded == length else f"{ANY} up to {padded} tokens with their answers"


def check_served(spec: Spec, base: Graph) -> None:
    """Check that onnxruntime-genai serves such a model, where the spec asks for that.

    Raises:
        SpecError: it does not; says what does.
    """
    for index, entry in enumerate(spec.emit):
        refusal = unserved(base) if entry.format == "genai" else None
        if refusal is not None:
            raise spec.error(("emit", index, "format"), refusal.reason, *refusal.notes)


def _why_not_run(written: ProgramArtifact) -> str | None:
    """Why onnxruntime-genai does not run the directory; None where it does."""
    if find_spec(PACKAGE) is None:
        return NOT_INSTALLED
    if not fits_in_memory(written.computes):
        return "not run: memory does not hold the model and its proof"
    return None


def _context_length(entry: GenaiEmit, defaults: Defaults) -> int:
    """The most tokens of a text.

    Raises:
        AdaptcError: nothing says so.
    """
    length = entry.context_length or defaults.context_length
    if length is None:
        raise AdaptcError(
            "onnxruntime-genai must know how many tokens a text can have, and the base does not say",
            "write it in the entry, such as `context_length: 2048`",
        )
    return length


def _eos(entry: GenaiEmit, defaults: Defaults, decoder: Served) -> list[int]:
    """The tokens that end a text.

    Raises:
        AdaptcError: nothing says so, or there is no such token.
    """
    stated = defaults.ids.get("eos_token_id") if entry.eos_token_id is None else entry.eos_token_id
    eos = tokens_of(stated)
    if not eos:
        raise AdaptcError(
            "onnxruntime-genai must know which token ends a text, and the base does not say",
            "write it in the entry, such as `eos_token_id: 2`",
        )
    wrong = [token for token in eos if token >= decoder.vocabulary]
    if wrong:
        raise AdaptcError(
            f"the token {wrong[0]} ends a text, and the model has the tokens 0 to {decoder.vocabulary - 1}",
            "write another in the entry, such as `eos_token_id: 2`",
        )
    return eos
