"""Whether a model repeats itself: the same outputs for the same inputs, in evaluation mode."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from adaptc.compiler.proof.runners import Runner
from adaptc.errors import TraceError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Run
from adaptc.ir.laws import DROPOUTS
from adaptc.ir.nodes import operation, provenance


def check_repeats(model: nn.Module, eager: Runner, base: Graph, batches: Batches) -> None:
    """Check that a model depends on its inputs alone.

    Args:
        model: the model, for its name.
        eager: runs it.
        base: its trace.
        batches: inputs that it takes.

    Raises:
        TraceError: two runs that draw the same random numbers differ, so it keeps something from call to call; or two
            that draw others do, so it is random.
    """
    first, again, other = (_with_seed(seed, eager, batches) for seed in (0, 0, 1))
    calls = (
        f"two calls of {type(model).__name__} on the same inputs in evaluation mode gave different outputs"
    )
    if not _equal(first, again):
        raise TraceError(
            f"{calls}, and drew the same random numbers",
            "forward keeps something from call to call outside the module's buffers and attributes, such as a global "
            "variable",
            "expected outputs that depend on the inputs alone",
        )
    if not _equal(first, other):
        raise TraceError(
            f"{calls}, since it draws random numbers",
            *_random_line(base),
            "expected a model that is random in training only",
            "let it depend on self.training, as nn.Dropout and F.dropout(x, p, self.training) do",
        )


def _with_seed(seed: int, eager: Runner, batches: Batches) -> Run:
    """One run whose random numbers start from a seed."""
    untyped: Any = torch
    with untyped.random.fork_rng(devices=[]), _other_generators():
        untyped.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        return eager.on(batches)


@contextmanager
def _other_generators() -> Generator[None]:
    """A context after which Python's random numbers, and numpy's, go on as before."""
    numpy: Any = sys.modules.get("numpy")
    state, array_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(array_state)


def _random_line(base: Graph) -> list[str]:
    """The line of the first operation of a trace that draws random numbers in evaluation; none if none does."""
    seeded = torch.Tag.nondeterministic_seeded
    drawing = [node for node in base.nodes if seeded in getattr(node.target, "tags", ())]
    drawing = [node for node in drawing if node.target not in DROPOUTS and not _is_quiet_attention(node)]
    return [f"drawn by {operation(node)}, {' '.join(provenance(node))}" for node in drawing[:1]]


def _is_quiet_attention(node: fx.Node) -> bool:
    """Whether a node is attention that drops nothing out."""
    attention = node.target is torch.ops.aten.scaled_dot_product_attention.default
    return attention and not (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))


def _equal(first: Run, second: Run) -> bool:
    """Whether two runs gave the same values, bit by bit, on the batches that both took; NaN is NaN."""
    for name in first.taken.keys() & second.taken.keys():
        a, b = first.outcomes[name], second.outcomes[name]
        if isinstance(a, list) and isinstance(b, list) and not all(map(_same, a, b)):
            return False
    return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
