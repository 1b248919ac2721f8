"""onnxruntime-genai: a directory that it serves, as a model that continues texts. Its telemetry is switched off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptc.emit.genai.files import PROGRAM, TOKENIZER, read_config, tokens_of
from adaptc.emit.onnx.adapter_check import check_adapter
from adaptc.errors import AdaptcError
from adaptc.generation.settings import Settings, as_message, room_for
from adaptc.optional import optional

PACKAGE = "onnxruntime_genai"
"""The name that it is imported by."""
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\nand\ttwo lines",
    "naïve Zürich, 東京, 🙂",
    "def f(x): return x ** 2  # 3.14",
)
"""Texts on which the package's tokenizer is held against transformers'."""
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ACTIVE = "active"
"""What the package calls the adapter that is active."""
PLAIN: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Settings under which the largest logit is the next token."""


def genai() -> Any:
    """The package onnxruntime-genai, whose telemetry is switched off.

    Raises:
        MissingPackageError: it is not installed; says how to install it.
    """
    package = optional(PACKAGE)
    package.disable_telemetry_events()
    return package


class GenaiModel:
    """A directory of onnxruntime-genai, loaded.

    Args:
        directory: the directory.
        shown: the path that an error names, if not the directory's own.

    Attributes:
        directory: the directory.
        package: the package.
        model: the package's own model.
        config: the content of genai_config.json.
        adapters: the package's own, of which `ACTIVE` is active; None for the base.

    Raises:
        MissingPackageError: the package is not installed.
        AdaptcError: it does not take the directory.
    """

    def __init__(self, directory: Path, shown: Path | None = None):
        self.directory, self.package, self.config = directory, genai(), read_config(directory)
        try:
            self.model = self.package.Model(str(directory))
        except RuntimeError as error:
            raise AdaptcError(f"{shown or directory}: onnxruntime-genai does not take it: {error}") from error
        self.adapters: Any = None

    def adapted(self, adapter: Path) -> GenaiModel:
        """The same model with an adapter.

        Args:
            adapter: an `.onnx_adapter` file that was made for it.

        Raises:
            AdaptcError: it was not, or the package does not take it.
        """
        with_it = copy(self)
        check_adapter(adapter, self.directory / PROGRAM)
        with_it.adapters = self.package.Adapters(self.model)
        try:
            with_it.adapters.load(str(adapter), ACTIVE)
        except RuntimeError as error:
            raise AdaptcError(f"{adapter}: onnxruntime-genai does not take it: {error}") from error
        return with_it

    @cached_property
    def tokenizer(self) -> Any:
        """The package's tokenizer, from the files of the directory.

        Raises:
            AdaptcError: there is none, or the package does not take it.
        """
        if not (self.directory / TOKENIZER).is_file():
            raise AdaptcError(f"{self.directory}: there is no {TOKENIZER}, so that it takes token ids alone")
        try:
            return self.package.Tokenizer(self.model)
        except RuntimeError as error:
            raise AdaptcError(
                f"{self.directory}: onnxruntime-genai does not take its tokenizer: {error}"
            ) from error

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset(tokens_of(self.config["model"]["eos_token_id"]))

    @property
    def pad(self) -> int:
        """The token that fills shorter texts of a batch up, behind them."""
        return self.config["model"]["pad_token_id"]

    @property
    def longest(self) -> int:
        """The most tokens that a text can have with its answer."""
        return self.config["model"]["context_length"]

    @property
    def hears(self) -> str | None:
        """The input of the features of sound; None in a model of text alone."""
        encoder = self.config["model"].get("encoder")
        return None if encoder is None else encoder["inputs"]["audio_features"]

    def generator(self, texts: Sequence[Sequence[int]], new: int, sound: Any = None, **settings: Any) -> Any:
        """A generator of the package's own that has read some texts, shorter ones padded behind.

        Args:
            texts: the token ids of each.
            new: the most tokens that may follow the longest.
            sound: what is heard with each, `(texts, features, frames)`, where the model hears.
            settings: of the package's search, in place of the directory's own.
        """
        import numpy as np

        longest = max(map(len, texts))
        rows = [[*text, *[self.pad] * (longest - len(text))] for text in texts]
        params = self.package.GeneratorParams(self.model)
        params.set_search_options(batch_size=len(texts), max_length=longest + new, **settings)
        generator = self.package.Generator(self.model, params)
        if self.adapters is not None:
            generator.set_active_adapter(self.adapters, ACTIVE)
        if self.hears is not None:
            heard = self.package.NamedTensors()
            heard[self.hears] = np.ascontiguousarray(sound)
            generator.set_inputs(heard)
        generator.append_tokens(np.array(rows, dtype=np.int32))
        return generator

    def tokens(self, prompt: str, chat: bool | None = None) -> list[int]:
        """The token ids of a prompt, see `Decoder`."""
        templated = self._templated(prompt) if chat is not False else None
        if templated is None and chat:
            raise AdaptcError(f"{self.directory}: its tokenizer has no chat template", "leave --chat out")
        text = prompt if templated is None else templated
        self.tokenizer.update_options(add_special_tokens="true" if templated is None else "false")
        return [int(token) for token in self.tokenizer.encode(text)]

    def _templated(self, prompt: str) -> str | None:
        """A prompt in the chat template; None where the tokenizer has none."""
        stated = json.loads((self.directory / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        if "chat_template" not in stated and not (self.directory / CHAT_TEMPLATE).is_file():
            return None
        return self.tokenizer.apply_chat_template(as_message(prompt), add_generation_prompt=True)

    def search(self, settings: Settings) -> dict[str, Any]:
        """The settings that are in force, see `Decoder`."""
        return settings.over({**self.config["search"], "num_beams": 1, "num_return_sequences": 1})

    def stream(self, tokens: Sequence[int], settings: Settings, seed: int) -> Iterator[tuple[int, str]]:
        """The tokens that follow, and the text that each adds, see `Decoder`.

        Raises:
            AdaptcError: the prompt fills the context, or the model hears sound.
        """
        if self.hears is not None:
            raise AdaptcError(
                f"{self.directory}: it writes down what it hears, and a prompt is no sound",
                f"call onnxruntime-genai, and give it {self.hears}: docs/serving.md",
            )
        new = room_for(settings.max_new_tokens, len(tokens), self.longest)
        search = self.search(settings)
        del search["max_length"]
        generator = self.generator([tokens], new, random_seed=seed, **search)
        decode = self.tokenizer.create_stream().decode
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token, decode(token)

    def greedy(self, texts: Sequence[Sequence[int]], new: int, sound: Any = None) -> list[list[int]]:
        """The likeliest tokens that follow some texts, of one batch.

        Args:
            texts: the token ids of each.
            new: how many tokens; fewer where one ends the text.
            sound: see `generator`.
        """
        generator, steps = self.generator(texts, new, sound, **PLAIN), list[list[int]]()
        while not generator.is_done():
            generator.generate_next_token()
            steps.append([int(token) for token in generator.get_next_tokens()])
        return [self._until_end(answer) for answer in zip(*steps, strict=True)]

    def _until_end(self, tokens: Sequence[int]) -> list[int]:
        end = next((place + 1 for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return list(tokens[:end])


def other_tokens(model: GenaiModel, directory: Path) -> str | None:
    """The first text of `SAMPLES` that the package's tokenizer makes other tokens of than transformers'; None if none.

    The package adds the tokens that begin a text only where it is told to.

    Args:
        model: the directory, loaded.
        directory: the directory with the tokenizer's files.
    """
    cls: Any = optional("transformers").AutoTokenizer
    tokenizer = cls.from_pretrained(directory)
    model.tokenizer.update_options(add_special_tokens="true")
    for text in SAMPLES:
        expected, got = tokenizer(text)["input_ids"], [int(token) for token in model.tokenizer.encode(text)]
        if expected != got:
            return f"onnxruntime-genai makes the tokens {got} of {text!r}, and transformers {expected}"
    return None
