"""Registries: classes by the names a spec calls them by, shipped with adaptc or of an installed package."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar

from adaptc.errors import AdaptcError, DefinitionError
from adaptc.registry.author import Author

ENTRY_POINT_GROUP = "adaptc.passes"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""Lower case with hyphens."""
T = TypeVar("T")
D = TypeVar("D")
Check = Callable[[str, Any, Author], None]
"""Raises a DefinitionError for a name, what is registered under it, and its author."""


class Registry(Mapping[str, T], Generic[T]):
    """What is known of one kind, such as methods, by name. It is read like a dict.

    Modules shipped with adaptc, and the packages of entry points, are imported when it is first read. What is
    registered later is seen at once; a class that is defined again, as when a notebook's cell is run again, replaces
    the earlier one.

    Args:
        kind: what it holds, as messages call it.
        packages: every module of these is imported; each registers itself.
        check: called for each name before it is registered.
    """

    def __init__(self, kind: str, *packages: str, check: Check | None = None):
        self.kind, self.packages, self.check = kind, packages, check
        self._items: dict[str, T] = {}
        self._authors: dict[str, Author] = {}
        self._shipped = False

    def register(self, name: str) -> Callable[[D], D]:
        """A decorator that registers what it decorates, which then knows its `name`.

        Raises:
            DefinitionError: the name is not kebab-case or another author's, or the check finds a mistake.
        """

        def decorate(item: D) -> D:
            author = Author.of(item, sys._getframe(1))
            if not author.module.startswith(tuple(f"{package}." for package in self.packages)):
                self._import_shipped()
            self._check(name, item, author)
            self._items[name] = item  # type: ignore[assignment]
            self._authors[name] = author
            return item

        return decorate

    def author(self, name: str) -> Author:
        """Who registered a name."""
        return self._authors[name]

    def forget(self, name: str) -> None:
        """Take a name out again."""
        del self._items[name], self._authors[name]

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(list(self._items))

    def __len__(self) -> int:
        self._load()
        return len(self._items)

    def _check(self, name: str, item: Any, author: Author) -> None:
        if NAME.fullmatch(name) is None:
            raise DefinitionError(
                f"a {self.kind}'s name is lower case with hyphens, got {name!r}", author.place
            )
        earlier = self._authors.get(name)
        if earlier is not None and not author.may_replace(earlier):
            raise DefinitionError(
                f"{self.kind} {name!r} is registered already, "
                f"by {earlier.module}.{earlier.qualname} at {earlier.place}",
                author.place,
                "give one of them another name",
            )
        if self.check is not None:
            self.check(name, item, author)
        item.name = name

    def _import_shipped(self) -> None:
        if self._shipped:
            return
        with _LOCK:
            self._shipped = True  # what is imported may read the registry
            try:
                for package in self.packages:
                    for module in pkgutil.iter_modules(
                        importlib.import_module(package).__path__, package + "."
                    ):
                        importlib.import_module(module.name)
            except BaseException:
                self._shipped = False
                raise

    def _load(self) -> None:
        self._import_shipped()
        _INSTALLED.load()


class _Installed:
    """The packages that extend adaptc: every entry point of the group is imported once."""

    def __init__(self) -> None:
        self.loaded = False

    def load(self) -> None:
        """Import them.

        Raises:
            AdaptcError: one cannot be imported.
        """
        if self.loaded:
            return
        with _LOCK:
            self.loaded = True  # what is imported may read a registry
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                try:
                    entry_point.load()
                except Exception as error:
                    self.loaded = False
                    package = entry_point.dist.name if entry_point.dist else "an installed package"
                    raise AdaptcError(
                        f"{package} (entry point {entry_point.name} = {entry_point.value}) cannot be loaded: "
                        f"{type(error).__name__}: {error}",
                        "mend that package, or uninstall it",
                    ) from error


_LOCK = RLock()
_INSTALLED = _Installed()
