"""What a registry holds: classes by the names a spec calls them by."""

from __future__ import annotations

import re
from typing import Any


def register(known: dict[str, Any], kind: str, name: str, cls: Any) -> None:
    """Put a class into a registry under its name, which it then knows itself.

    Raises:
        ValueError: the name is not kebab-case, or is taken by another class.
    """
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) is None:
        raise ValueError(f"a {kind}'s name is lower case with hyphens, got {name!r}")
    other = known.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{kind} {name!r} is registered already, by {other.__module__}.{other.__qualname__}")
    cls.name = name
    known[name] = cls


def require_frozen(kind: str, name: str, cls: Any) -> None:
    """Options are the fields of a frozen dataclass.

    Raises:
        ValueError: the class is none.
    """
    if "__dataclass_params__" not in vars(cls) or not cls.__dataclass_params__.frozen:
        raise ValueError(f"{kind} {name!r}: write @{kind} above @dataclass(frozen=True)")
