"""The artifact of onnxruntime-genai: a directory written, and proved by the tokens that the package generates from it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptc.compiler.greedy_proof import Answers, gaps_change_nothing, prove_greedy
from adaptc.compiler.program import Program
from adaptc.compiler.program_artifact import ProgramArtifact, write_program
from adaptc.emit.genai.config import PROGRAM, Defaults, defaults_of, genai_config, write_config
from adaptc.emit.genai.decoder import WAY_OUT, Served, served, unserved
from adaptc.emit.genai.tokenizer import copy_tokenizer
from adaptc.emit.huggingface import fits_in_memory
from adaptc.emit.onnx.export import Wrote
from adaptc.errors import AdaptcError, Refusal, RefusedError
from adaptc.spec.emit import GenaiEmit

PACKAGE = "onnxruntime_genai"
ANY, ONE = "texts of any lengths", "texts of one length"
"""What a batch may hold."""


def write_genai(
    program: Program, entry: GenaiEmit, directory: Path, final: Path, wrote: Wrote | None = None
) -> tuple[ProgramArtifact, dict[str, Any]]:
    """Write a directory that onnxruntime-genai serves as it stands, and prove it.

    The program in it is proved as any with a cache. Where the package is installed, the tokens that it generates are
    held against the program's graph without a cache.

    Args:
        program: the compiled program.
        entry: the spec's entry.
        directory: the directory to write.
        final: where it will be put.
        wrote: called while the weights are written.

    Returns:
        The program in it, and what a manifest says of the directory.

    Raises:
        RefusedError: onnxruntime-genai does not serve such a model.
        AdaptcError: it cannot be made or written, or a proof failed.
    """
    refusal = unserved(program.base)
    if refusal is not None:
        raise RefusedError([refusal])
    directory.mkdir(parents=True)
    try:
        written = write_program(
            program, entry.program, directory / PROGRAM, final / PROGRAM, wrote, beside=True
        )
    except RefusedError as error:  # what a cache cannot hold
        refusals = [
            Refusal(r.reason, r.nodes, (*r.notes, f"without a cache {WAY_OUT}")) for r in error.refusals
        ]
        raise RefusedError(refusals, error.source) from error
    assert written.file.signature is not None
    decoder = served(program.base, written.file.signature)
    defaults = defaults_of(program.base.source.pretrained)
    length, eos = _context_length(entry, defaults), _eos(entry, defaults, decoder)
    has_tokenizer = copy_tokenizer(program.base.source.pretrained, directory)
    config = genai_config(decoder, defaults, length, eos)
    write_config(directory, config)

    exact = gaps_change_nothing(program, written, decoder)
    answers = _answers(program, written, decoder, directory, exact, length)
    about = {
        **written.about,
        "batches": ANY if exact else ONE,
        "context_length": length,
        "tokenizer": has_tokenizer,
        "generation": config["search"],
        "generation_left_out": dict(defaults.left_out),
        "greedy": answers if isinstance(answers, str) else answers.to_json(),
    }
    return written, about


def _answers(
    program: Program, written: ProgramArtifact, decoder: Served, directory: Path, exact: bool, length: int
) -> Answers | str:
    """The tokens that onnxruntime-genai generates, proved; or why it was not run."""
    if find_spec(PACKAGE) is None:
        return "not run: onnxruntime-genai is not installed: pip install 'adaptc[serve]'"
    if not fits_in_memory(written.computes):
        return "not run: memory does not hold the model and its proof"
    return prove_greedy(program, written, decoder, directory, exact, length)


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


def _eos(entry: GenaiEmit, defaults: Defaults, decoder: Served) -> Any:
    """The token, or tokens, that end a text.

    Raises:
        AdaptcError: nothing says so, or there is no such token.
    """
    eos = defaults.ids.get("eos_token_id") if entry.eos_token_id is None else entry.eos_token_id
    if eos is None:
        raise AdaptcError(
            "onnxruntime-genai must know which token ends a text, and the base does not say",
            "write it in the entry, such as `eos_token_id: 2`",
        )
    wrong = [token for token in (eos if isinstance(eos, list) else [eos]) if token >= decoder.vocabulary]
    if wrong:
        raise AdaptcError(
            f"the token {wrong[0]} ends a text, and the model has the tokens 0 to {decoder.vocabulary - 1}",
            "write another in the entry, such as `eos_token_id: 2`",
        )
    return eos
