"""An ONNX program with a cache, run in ONNX Runtime, as a model that continues texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.emit.onnx.adapter_check import check_adapter
from adaptc.emit.onnx.cached import read_inputs, read_longest, read_outputs, read_signature
from adaptc.emit.onnx.provenance import embedded
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.generation.sampling import Sampler, stated_settings
from adaptc.generation.settings import Settings, room_for
from adaptc.generation.texts import PieceStream, Tokenizer
from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import PAST_PREFIX, CacheSignature, past_of

ADVICE = "write `{format: onnx, path: model.onnx, cache: true}` or `{format: genai, path: serve}` in the spec's emit"


class OnnxDecoder:
    """An ONNX program with a cache, loaded with a tokenizer.

    Args:
        path: the program.
        tokenizer: a directory, or a hub id; the base's if it is None.
        adapter: an `.onnx_adapter` file, where the program takes adapters; the base if it is None.

    Attributes:
        tokenizer: the tokenizer.
        signature: what the program takes and gives.
        longest: the most tokens that a text can have with its answer; None where there is no such number.

    Raises:
        SpecError: the program has no cache.
        AdaptcError: it needs more than tokens, a mask and positions, or the adapter was not made for it.
    """

    def __init__(self, path: Path, tokenizer: str | None = None, adapter: Path | None = None):
        signature = read_signature(path)
        if signature is None:
            message = "it has no cache, so that every token would cost a run of the whole text"
            raise SpecError([Problem(message, file=str(path), notes=(ADVICE,))])
        name = tokenizer or base_of(path)
        if adapter is not None:
            check_adapter(adapter, path)
        self.path, self.signature, self.tokenizer = path, signature, Tokenizer(name)
        limit = read_longest(path)
        self.longest = None if limit is None else limit + 1  # the last token is not read
        self._fed = _fed(path, signature)
        self._call = session_call(open_session(path, threads=0), adapter)
        self._defaults = stated_settings(name)
        self._encoder = None
        if signature.encoder is not None:
            self._encoder = _Encoder(path.with_name(signature.encoder), adapter)

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
        text, encoded = self._begin(tokens)
        new = room_for(settings.max_new_tokens, len(text), self.longest)
        pieces, past, done = PieceStream(self.tokenizer), self.signature.empty(1), 0
        for number in range(new):
            outputs = self._run(text, done, past, encoded)
            past, done = self.signature.next_past(outputs), len(text)
            token = sampler.next(text, outputs[self.signature.results[0]][0, -1])
            text.append(token)
            last = token in ends or number + 1 == new
            yield token, pieces.add(token, last)
            if token in ends:
                return

    def next_scores(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits of the token that follows a prompt: (vocabulary,), float32."""
        text, encoded = self._begin(tokens)
        outputs = self._run(text, 0, self.signature.empty(1), encoded)
        return outputs[self.signature.results[0]][0, -1].float()

    def _begin(self, tokens: Sequence[int]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The text to continue, and what an encoder gives of the prompt: a decoder beside it begins an answer.

        Raises:
            AdaptcError: nothing says with which token.
        """
        if self._encoder is None:
            return list(tokens), {}
        if self._defaults.start is None:
            raise AdaptcError(
                f"{self.path}: nothing says which token begins an answer",
                "state decoder_start_token_id in the base's generation_config.json",
            )
        return [self._defaults.start], self._encoder.run(tokens)

    def _run(
        self,
        text: Sequence[int],
        start: int,
        past: Mapping[str, torch.Tensor],
        encoded: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """One call, with the tokens from `start`."""
        whole = {**encoded, **_values(self._fed, text)}
        call = {**encoded, **self.signature.part(whole, start, len(text)), **past}
        try:
            results = self._call(call)
        except Exception as error:
            raise AdaptcError(
                f"{self.path}: it does not run on a text of {len(text)} tokens: {error}"
            ) from error
        return dict(zip(self.signature.outputs, results, strict=True))


class _Encoder:
    """The program of an encoder of text.

    Args:
        path: the program.
        adapter: an `.onnx_adapter` file; None for the base.

    Raises:
        AdaptcError: it needs more than tokens and a mask.
    """

    def __init__(self, path: Path, adapter: Path | None):
        inputs = read_inputs(path)
        self._fed = _named(path, inputs, {spec: _kind(spec) for spec in inputs})
        self._call, self._outputs = session_call(open_session(path, threads=0), adapter), read_outputs(path)

    def run(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        """Keys and values for the decoder, and the inputs that the two have in common."""
        values = _values(self._fed, tokens)
        results = self._call(values)
        return values | {past_of(n): value for n, value in zip(self._outputs, results, strict=True)}


Fed = Mapping[str, tuple[str, str]]
"""The name of an input -> what is fed to it (ids, mask or positions), and its dtype."""


def _values(fed: Fed, text: Sequence[int]) -> dict[str, torch.Tensor]:
    """A text as the inputs of a program."""
    ids = torch.tensor([text])
    values = {"ids": ids, "mask": torch.ones_like(ids), "positions": torch.arange(len(text))[None]}
    return {name: values[kind].to(getattr(torch, dtype)) for name, (kind, dtype) in fed.items()}


def _fed(path: Path, signature: CacheSignature) -> Fed:
    """What is fed to a decoder besides keys and values, and the inputs that its encoder has too.

    Raises:
        AdaptcError: there is another input.
    """
    others = [spec for spec in signature.inputs if not spec.name.startswith(PAST_PREFIX)]
    shared: set[str] = set()
    if signature.encoder is not None:
        shared = {spec.name for spec in read_inputs(path.with_name(signature.encoder))}
    others = [spec for spec in others if spec.name not in shared]
    along = (signature.new, TOTAL)
    return _named(path, others, {spec: _kind(spec) if spec.dims[-1] in along else "" for spec in others})


def _named(path: Path, inputs: Sequence[InputSpec], kinds: Mapping[InputSpec, str]) -> Fed:
    unfed = ", ".join(f"{spec.name} {spec}" for spec in inputs if not kinds[spec])
    if unfed:
        raise AdaptcError(f"{path}: it takes {unfed}, and a text gives tokens, a mask and positions alone")
    return {spec.name: (kinds[spec], spec.dtype) for spec in inputs}


def _kind(spec: InputSpec) -> str:
    """What a text gives for an input; "" if nothing."""
    if len(spec.dims) != 2:
        return ""
    if "mask" in spec.name:
        return "mask"
    return "positions" if "position" in spec.name else "ids" if spec.dtype.startswith("int") else ""


def base_of(path: Path) -> str:
    """The base that a program was compiled from, whose tokenizer it needs.

    Raises:
        AdaptcError: the program does not name one that is there.
    """
    return base_in(embedded(path) or {}, path)


def base_in(entry: Mapping[str, Any], path: Path) -> str:
    """The base that an artifact was compiled from.

    Args:
        entry: what its manifest, or its metadata, says of it.
        path: its file or folder.

    Raises:
        AdaptcError: the entry does not name one that is there.
    """
    base: Mapping[str, Any] = entry.get("provenance", {}).get("spec", {}).get("base") or {}
    model: str | None = base.get("model")
    if model is None:
        raise AdaptcError(f"{path} names no base with a tokenizer", "name one: --tokenizer DIR")
    folder = (path if path.is_dir() else path.parent) / entry["provenance"]["spec_folder"]
    directory = (folder / Path(model).expanduser()).resolve()
    if directory.is_dir():
        return str(directory)
    if model.startswith((".", "/", "~")):
        raise AdaptcError(
            f"{path} was compiled from {directory}, which is not there", "name one: --tokenizer DIR"
        )
    return model
