"""When what an author registers is tried: at once, or on first use where torch is not imported yet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from adaptc.registry.definitions import Definition


class Trials:
    """The trials of one kind of definition.

    The laws of the tests hold for what adaptc ships, which is not tried.

    Args:
        attempt: tries a definition; raises DefinitionError where something is wrong.
    """

    def __init__(self, attempt: Callable[[Definition], None]):
        self._attempt = attempt
        self._untried: dict[type[Any], Definition] = {}

    def try_out(self, definition: Definition) -> None:
        """Try a definition; where torch is not imported yet, `try_pending` does.

        Raises:
            DefinitionError: something is wrong; names the author's line.
        """
        if definition.shipped:
            return
        self._untried[definition.cls] = definition
        if "torch" in sys.modules:
            self.try_pending(definition.cls)

    def try_pending(self, cls: type[Any]) -> None:
        """Try a class that was registered before torch was imported, if it was.

        Raises:
            DefinitionError: something is wrong; names the author's line.
        """
        definition = self._untried.get(cls)
        if definition is not None:
            self._attempt(definition)
            self._untried.pop(cls, None)
