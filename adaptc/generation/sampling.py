"""The next token from logits, by transformers' own processors of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.emit.genai.files import tokens_of
from adaptc.optional import optional

ALWAYS = {
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
}
"""A setting -> the class of transformers that applies it, whether tokens are drawn or not."""
WHEN_DRAWN = {
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
}
"""The same for those that count where tokens are drawn; in the order in which transformers applies them."""
NO_EFFECT: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "top_p": 1.0,
}
"""The value of a setting that changes nothing, which its class does not take."""


@dataclass(frozen=True)
class Stated:
    """The generation defaults of a directory.

    Attributes:
        search: the settings that are applied here.
        ends: the tokens that end a text.
        start: the token that begins an answer beside an encoder; None where nothing says so.
    """

    search: Mapping[str, Any]
    ends: frozenset[int]
    start: int | None = None


def stated_settings(name: str) -> Stated:
    """The generation defaults in a directory's, or hub id's, generation_config.json; none where it has no such file."""
    try:
        config: Any = optional("transformers").GenerationConfig.from_pretrained(name)
    except OSError:
        return Stated({}, frozenset())
    stated: dict[str, Any] = config.to_diff_dict()
    names = ("do_sample", *ALWAYS, *WHEN_DRAWN)
    return Stated(
        {n: stated[n] for n in names if stated.get(n) is not None},
        frozenset(tokens_of(config.eos_token_id)),
        config.decoder_start_token_id,
    )


class Sampler:
    """Chooses the next token: the likeliest, or one that is drawn.

    Args:
        search: the settings in force: `do_sample`, and those of `ALWAYS` and `WHEN_DRAWN`.
        seed: of the random numbers.
    """

    def __init__(self, search: Mapping[str, Any], seed: int):
        transformers = optional("transformers")
        self._draws, names = bool(search.get("do_sample")), ALWAYS
        if self._draws:
            names = ALWAYS | WHEN_DRAWN
        self._generator = torch.Generator().manual_seed(seed)
        self._processors = transformers.LogitsProcessorList(
            getattr(transformers, cls)(search[name])
            for name, cls in names.items()
            if name in search and search[name] != NO_EFFECT.get(name)
        )

    def next(self, text: Sequence[int], logits: torch.Tensor) -> int:
        """The token that follows a text, by its logits `(vocabulary,)`."""
        scores: torch.Tensor = self._processors(torch.tensor([text]), logits.float()[None])
        if self._draws:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        return int(scores.argmax())
