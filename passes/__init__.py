"""The transformations, one a file. Every registered pass is an attribute here: `adaptc.passes.Fold()`."""

from typing import Any


def __getattr__(name: str) -> Any:
    from adaptc.errors import unknown
    from adaptc.registry import load_passes

    if name.startswith("_"):
        raise AttributeError(name)
    passes = {cls.__name__: cls for cls in load_passes().values()}
    if name in passes:
        return passes[name]
    raise AttributeError(unknown("pass", name, sorted(passes)))
