"""How a text is continued, and what came of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adaptc.errors import AdaptcError, Problem, SpecError


@dataclass(frozen=True)
class Settings:
    """How a text is continued; what is None is as the model's own defaults say.

    Attributes:
        max_new_tokens: the most tokens that follow.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest tokens.
        top_p: draw among the likeliest tokens that have this share together.
        seed: of the random numbers.

    Raises:
        SpecError: a setting is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            "--max-new-tokens": ("1 or more", self.max_new_tokens < 1),
            "--temperature": ("0 or more", self.temperature is not None and self.temperature < 0),
            "--top-k": ("1 or more", self.top_k is not None and self.top_k < 1),
            "--top-p": ("above 0 and at most 1", self.top_p is not None and not 0 < self.top_p <= 1),
        }
        problems = [
            Problem(f"expected {range_}", file=option)
            for option, (range_, is_wrong) in wrong.items()
            if is_wrong
        ]
        if problems:
            raise SpecError(problems)

    def over(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The settings of a search: these where they are stated, in place of a model's defaults.

        Who states a temperature, `top_k` or `top_p` asks for tokens to be drawn, unless the temperature is 0.
        """
        stated = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        chosen = {name: value for name, value in stated.items() if value is not None}
        search = {**defaults, **chosen}
        search["do_sample"] = bool(chosen or defaults.get("do_sample")) and search.get("temperature") != 0
        if not search["do_sample"]:
            search = {name: value for name, value in search.items() if name not in stated}
        return search

    def drawn_from(self) -> int:
        """The seed; a new one where none is stated."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


class Decoder(Protocol):
    """A model that continues texts.

    Attributes:
        longest: the most tokens that a text can have with its answer; None where there is no such number.
    """

    @property
    def longest(self) -> int | None:
        """See above."""
        ...

    def tokens(self, prompt: str, chat: bool | None) -> list[int]:
        """The token ids of a prompt.

        Args:
            prompt: the text.
            chat: put it into the tokenizer's chat template as a message of the user; None does so where there is one.

        Raises:
            AdaptcError: there is no tokenizer, or no template though one is asked for.
        """
        ...

    def search(self, settings: Settings) -> dict[str, Any]:
        """The settings that are in force."""
        ...

    def stream(self, tokens: Sequence[int], settings: Settings, seed: int) -> Iterator[tuple[int, str]]:
        """The tokens that follow, and the text that each adds, until one ends the text."""
        ...


def room_for(new: int, tokens: int, longest: int | None) -> int:
    """How many tokens can follow a prompt, of those that may.

    Args:
        new: the most tokens that may follow.
        tokens: of the prompt.
        longest: the most tokens that a text can have; None where there is no such number.

    Raises:
        AdaptcError: the prompt leaves no room.
    """
    if longest is None:
        return new
    if tokens >= longest:
        raise AdaptcError(f"the prompt has {tokens} tokens, and the context {longest}", "shorten the prompt")
    return min(new, longest - tokens)


def as_message(prompt: str) -> str:
    """A prompt as the messages of a chat, in JSON."""
    return json.dumps([{"role": "user", "content": prompt}])
