"""The transformations, one a file. Every registered pass is an attribute here: `adaptc.passes.Fold()`.

So are the passes that insert a method or quantize by a scheme, `InsertLora(target=..., r=4)` and
`QuantizeNf4(target=...)`, and the general ones, which take a method or a scheme: `Insert(method, target=...)`,
`Quantize(scheme, target=...)`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from adaptc.errors import unknown
    from adaptc.rewriter.catalog import load_passes
    from adaptc.rewriter.insert.base import Insert
    from adaptc.rewriter.quantize import Quantize

    if name.startswith("_"):
        raise AttributeError(name)
    passes = {item.__name__: item for item in (*load_passes().values(), Insert, Quantize)}
    if name in passes:
        return passes[name]
    raise AttributeError(unknown("pass", name, sorted(passes)))
