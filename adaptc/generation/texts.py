"""Tokenizers of transformers: a prompt as tokens, and tokens as a text that grows."""

from __future__ import annotations

import json
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.generation.settings import as_message
from adaptc.optional import optional

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The end of a text whose last character is not whole yet."""


class Tokenizer:
    """A tokenizer of transformers.

    Args:
        name: its directory, or hub id.

    Raises:
        AdaptcError: there is none.
    """

    def __init__(self, name: str):
        self.name, cls = name, optional("transformers").AutoTokenizer
        try:
            self.own: Any = cls.from_pretrained(name)
        except Exception as error:  # whatever its files make transformers raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise AdaptcError(f"{name}: no tokenizer there: {reason}", "name one: --tokenizer DIR") from error

    @property
    def ends(self) -> frozenset[int]:
        """The token that ends a text, if there is one."""
        end = self.own.eos_token_id
        return frozenset() if end is None else frozenset([end])

    def tokens(self, prompt: str, chat: bool | None) -> list[int]:
        """The token ids of a prompt.

        Args:
            prompt: the text.
            chat: put it into the chat template; None does so where there is one.

        Raises:
            AdaptcError: there is no template though one is asked for.
        """
        if chat and self.own.chat_template is None:
            raise AdaptcError(f"{self.name}: its tokenizer has no chat template", "leave --chat out")
        if chat is False or self.own.chat_template is None:
            return list(self.own(prompt)["input_ids"])
        messages = json.loads(as_message(prompt))
        text: str = self.own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.own(text, add_special_tokens=False)["input_ids"])


class PieceStream:
    """A text that grows by tokens: each adds the characters that are whole by then.

    Args:
        tokenizer: makes the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode, self._tokens, self._shown = tokenizer.own.decode, list[int](), 0

    def add(self, token: int, last: bool) -> str:
        """The text that a token adds; with the last one, all that is left."""
        self._tokens.append(token)
        text: str = self._decode(self._tokens, skip_special_tokens=True)
        if text.endswith(UNFINISHED) and not last:
            return ""
        piece, self._shown = text[self._shown :], len(text)
        return piece
