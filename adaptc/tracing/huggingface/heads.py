"""The output heads of a Hugging Face model, which `all-linear` leaves out, as PEFT does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn


def heads_of(model: nn.Module) -> frozenset[str]:
    """The names of the modules that are output heads, or belong to one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    names = {name for name, module in modules.items() if head is not None and module is head}
    if not names and type(model).__name__.endswith("Classification"):
        names = {name for name in modules if name.split(".")[0] in ("classifier", "score")}
    return frozenset(names)
