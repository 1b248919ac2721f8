"""Texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence


class Stop:
    """An answer that grows piece by piece, until it holds one of some texts.

    What could be the beginning of one is held back until that is clear.

    Args:
        texts: each ends the answer, and is no part of it.

    Attributes:
        reached: whether one was met.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts, self._held, self.reached = [text for text in texts if text], "", False

    def add(self, piece: str) -> str:
        """The part of the answer that is certain now."""
        held = self._held + piece
        places = [held.find(text) for text in self._texts if text in held]
        if places:
            self.reached, self._held = True, ""
            return held[: min(places)]
        begun = max((self._begun(held, text) for text in self._texts), default=0)
        shown, self._held = held[: len(held) - begun], held[len(held) - begun :]
        return shown

    def rest(self) -> str:
        """What was held back, where the answer has ended otherwise."""
        rest, self._held = self._held, ""
        return rest

    def _begun(self, held: str, text: str) -> int:
        """How many characters at the end of an answer begin a text."""
        longest = min(len(text) - 1, len(held))
        return next((count for count in range(longest, 0, -1) if held.endswith(text[:count])), 0)
