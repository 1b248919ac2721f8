"""A registry: classes by the names a spec calls them by, shipped with adaptc or in an installed package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar, cast

from adaptc.errors import AdaptcError, DefinitionError
from adaptc.registry.author import Author
from adaptc.registry.definitions import decorator_of

ENTRY_POINT_GROUP = "adaptc.passes"
"""The group of entry points by which an installed package extends adaptc."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""What a name may be: kebab-case, lower case with hyphens."""
T = TypeVar("T")
D = TypeVar("D")
Check = Callable[[str, Any, Author], None]
"""Checks a name, the class or function registered under it, and its author; raises a DefinitionError."""


class Registry(Mapping[str, T], Generic[T]):
    """The classes of one kind, such as methods, by name. It is read like a dict.

    Modules shipped with adaptc, and the packages of entry points, are imported when it is first read. A class that
    registers later is found from then on. A class that is defined again, as when a notebook's cell is run again,
    replaces the earlier one.

    Args:
        kind: what one entry is called in messages, such as `method`.
        packages: the packages whose modules are imported. Each module registers itself.
        check: called for each name before it is registered; None for no check.
    """

    def __init__(self, kind: str, *packages: str, check: Check | None = None):
        self.kind, self.packages, self.check = kind, packages, check
        self._items: dict[str, T] = {}
        self._authors: dict[str, Author] = {}
        self._shipped = False

    def register(self, name: str) -> Callable[[D], D]:
        """A decorator that registers a class or function and sets its attribute `name`.

        Raises:
            DefinitionError: there is no name, it is not kebab-case, another author has registered it, or the check
                finds a mistake.
        """
        if not isinstance(cast(object, name), str):
            raise self._unnamed(name)

        def decorate(item: D) -> D:
            frame = inspect.currentframe()
            caller = frame.f_back if frame else None
            if caller is None:
                raise RuntimeError("this Python keeps no frames, so no author can be named")
            author = Author.of(item, caller)
            if not author.module.startswith(tuple(f"{package}." for package in self.packages)):
                self._import_shipped()
            self._check(name, item, author)
            self._items[name] = cast("T", item)
            self._authors[name] = author
            return item

        return decorate

    def author(self, name: str) -> Author:
        """Where the class of a name was registered."""
        return self._authors[name]

    def forget(self, name: str) -> None:
        """Remove a name."""
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

    def _unnamed(self, item: object) -> DefinitionError:
        """The error on a decorator without its name, which gets the class or function instead."""
        decorator = decorator_of(self.kind)
        frame = inspect.currentframe()
        while frame is not None and re.match(r"adaptc\.(?!passes\.)", frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        place = (
            Author.of(item, frame).place
            if frame is not None and hasattr(item, "__qualname__")
            else repr(item)
        )
        return DefinitionError(f'write @{decorator}("a-name"), with the name that a spec calls it by', place)

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
            self._shipped = True  # a module that is imported may read the registry
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
    """The installed packages that extend adaptc. Each entry point of the group is imported once."""

    def __init__(self) -> None:
        self.loaded = False

    def load(self) -> None:
        """Import every entry point of the group, unless that is done.

        Raises:
            AdaptcError: a package cannot be imported.
        """
        if self.loaded:
            return
        with _LOCK:
            self.loaded = True  # a package that is imported may read a registry
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                try:
                    entry_point.load()
                except Exception as error:
                    self.loaded = False
                    package = entry_point.dist.name if entry_point.dist else "an installed package"
                    raise AdaptcError(
                        f"{package} (entry point {entry_point.name} = {entry_point.value}) cannot be loaded: "
                        f"{type(error).__name__}: {error}",
                        "repair that package, or uninstall it",
                    ) from error


_LOCK = RLock()
_INSTALLED = _Installed()
