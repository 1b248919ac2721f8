"""An ONNX program with a cache, run in ONNX Runtime, as a model that continues texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.emit.onnx.cached import read_signature
from adaptc.emit.onnx.provenance import embedded
from adaptc.emit.onnx.runtime import as_array, open_session
from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.generation.sampling import Sampler, stated_settings
from adaptc.generation.settings import Settings
from adaptc.generation.texts import PieceStream, Tokenizer
from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import PAST_PREFIX, CacheSignature

ADVICE = "write `{format: onnx, path: model.onnx, cache: true}` or `{format: genai, path: serve}` in the spec's emit"


class OnnxDecoder:
    """An ONNX program with a cache, loaded with a tokenizer.

    Args:
        path: the program.
        tokenizer: a directory, or a hub id; the base's if it is None.

    Attributes:
        tokenizer: the tokenizer.
        signature: what the program takes and gives.

    Raises:
        SpecError: the program has no cache.
        AdaptcError: it needs more than tokens, a mask and positions.
    """

    def __init__(self, path: Path, tokenizer: str | None = None):
        signature = read_signature(path)
        if signature is None:
            message = "it has no cache, so that every token would cost a run of the whole text"
            raise SpecError([Problem(message, file=str(path), notes=(ADVICE,))])
        name = tokenizer or base_of(path)
        self.path, self.signature, self.tokenizer = path, signature, Tokenizer(name)
        self._fed = _fed(path, signature)
        self._session = open_session(path, threads=0)
        self._defaults = stated_settings(name)

    def tokens(self, prompt: str, chat: bool | None = None) -> list[int]:
        """The token ids of a prompt, see `Decoder`."""
        return self.tokenizer.tokens(prompt, chat)

    def search(self, settings: Settings) -> dict[str, Any]:
        """The settings that are in force, see `Decoder`."""
        return settings.over(dict(self._defaults.search))

    def stream(self, tokens: Sequence[int], settings: Settings, seed: int) -> Iterator[tuple[int, str]]:
        """The tokens that follow, and the text that each adds, see `Decoder`."""
        sampler = Sampler(self.search(settings), seed)
        ends = self._defaults.ends or self.tokenizer.ends
        pieces, text = PieceStream(self.tokenizer), list(tokens)
        past, done = self.signature.empty(1), 0
        for number in range(settings.max_new_tokens):
            outputs = self._run(text, done, past)
            past, done = self.signature.next_past(outputs), len(text)
            token = sampler.next(text, outputs[self.signature.results[0]][0, -1])
            text.append(token)
            last = token in ends or number + 1 == settings.max_new_tokens
            yield token, pieces.add(token, last)
            if token in ends:
                return

    def _run(
        self, text: Sequence[int], start: int, past: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One call, with the tokens from `start`."""
        ids = torch.tensor([text])
        values = {"ids": ids, "mask": torch.ones_like(ids), "positions": torch.arange(len(text))[None]}
        whole = {name: values[kind].to(getattr(torch, dtype)) for name, (kind, dtype) in self._fed.items()}
        call = {**self.signature.part(whole, start, len(text)), **past}
        try:
            arrays = self._session.run(None, {name: as_array(value) for name, value in call.items()})
        except Exception as error:
            raise AdaptcError(
                f"{self.path}: it does not run on a text of {len(text)} tokens: {error}"
            ) from error
        return {n: torch.as_tensor(a) for n, a in zip(self.signature.outputs, arrays, strict=True)}


def _fed(path: Path, signature: CacheSignature) -> dict[str, tuple[str, str]]:
    """The name of each input but keys and values -> what is fed to it (ids, mask or positions), and its dtype.

    Raises:
        AdaptcError: there is another input.
    """
    others = [spec for spec in signature.inputs if not spec.name.startswith(PAST_PREFIX)]
    fed = {spec.name: (_kind(spec, signature), spec.dtype) for spec in others}
    others = [spec for spec in others if fed[spec.name][0] == ""]
    if others:
        shown = ", ".join(f"{spec.name} {spec}" for spec in others)
        raise AdaptcError(f"{path}: it takes {shown}, and a text gives tokens, a mask and positions alone")
    return fed


def _kind(spec: InputSpec, signature: CacheSignature) -> str:
    if len(spec.dims) != 2 or spec.dims[1] not in (signature.new, TOTAL):
        return ""
    if "mask" in spec.name:
        return "mask"
    return "positions" if "position" in spec.name else "ids" if spec.dtype.startswith("int") else ""


def base_of(path: Path) -> str:
    """The base that a program was compiled from, whose tokenizer it needs.

    Raises:
        AdaptcError: the program does not name one that is there.
    """
    record = embedded(path)
    base: Mapping[str, Any] = (record or {}).get("provenance", {}).get("spec", {}).get("base") or {}
    model: str | None = base.get("model")
    if record is None or model is None:
        raise AdaptcError(f"{path} names no base with a tokenizer", "name one: --tokenizer DIR")
    folder = path.parent / record["provenance"]["spec_folder"]
    directory = (folder / Path(model).expanduser()).resolve()
    if directory.is_dir():
        return str(directory)
    if model.startswith((".", "/", "~")):
        raise AdaptcError(
            f"{path} was compiled from {directory}, which is not there", "name one: --tokenizer DIR"
        )
    return model
