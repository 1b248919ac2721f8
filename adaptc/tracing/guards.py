"""A trace follows one way through the model; it must be the way of every size of a named dimension."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from traceback import FrameSummary
from typing import Any

import torch
from sympy import false
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.explain import is_authors, place

FACTORS = (2, 40, 1000)
"""How much longer than traced each named dimension is thought to be: its parity changes, and limits are passed."""


def check_sizes(
    model: nn.Module, program: Any, inputs: Sequence[InputSpec], sizes: Mapping[str, int]
) -> None:
    """Check that no condition on a named dimension, under which the model was traced, fails at a larger size.

    A condition may fail where the model itself refuses that size, such as positions beyond its table; that is
    tried on tensors without values.

    Raises:
        TraceError: the model runs there, but another way.
    """
    symbols = _symbols(program, inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    for name, larger in _larger(sizes, _longest(model)):
        known = {symbol: larger[dim] for symbol, dim in symbols.items()}
        failed = next((guard for guard in guards if guard.expr.subs(known) is false), None)
        if failed is None or not _runs(model, inputs, larger):
            continue
        spec = next(spec for spec in inputs if name in spec.dims)
        fixed = ", ".join(str(sizes[name] if dim == name else dim) for dim in spec.dims)
        raise TraceError(
            f"{type(model).__name__} could not be traced: it takes another way at {name}={larger[name]} than at "
            f"{name}={sizes[name]}, where `{failed.expr.subs(symbols)}`",
            *_where(failed.sloc),
            "expected the same operations for every size of a named dimension",
            f"fix that dimension by a number, such as {spec.name}: {spec.dtype}[{fixed}], or move the choice out of "
            "forward",
        )


def _symbols(program: Any, inputs: Sequence[InputSpec]) -> dict[Any, str]:
    """torch's symbol of each size -> the name of the dimension."""
    specs = {spec.name: spec for spec in inputs}
    found: dict[Any, str] = {}
    for node in program.graph.nodes:
        spec = specs.get(str(node.target)) if node.op == "placeholder" else None
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True) if spec else ():
            if isinstance(size, torch.SymInt) and isinstance(dim, str):
                found |= {symbol: dim for symbol in (size.node._expr, size.node.expr) if symbol.is_Symbol}
    return found


def _larger(sizes: Mapping[str, int], longest: int) -> Iterator[tuple[str, dict[str, int]]]:
    for factor in FACTORS:
        for name, size in sizes.items():
            yield name, {**sizes, name: max(size, min(size * factor, longest))}


def _longest(model: nn.Module) -> int:
    """The longest sequence that a Hugging Face configuration is meant for; some models make larger tables beyond."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else sys.maxsize


def _runs(model: nn.Module, inputs: Sequence[InputSpec], sizes: Mapping[str, int]) -> bool:
    fake = (tensor for tensor in model.parameters() if isinstance(tensor, FakeTensor))
    mode = next((tensor.fake_mode for tensor in fake), None) or FakeTensorMode(allow_non_fake_inputs=True)
    buffers = {part: dict(part._buffers) for part in model.modules()}
    with mode, torch.no_grad():
        examples = {
            spec.name: torch.empty(
                [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims],
                dtype=getattr(torch, spec.dtype),
            )
            for spec in inputs
        }
        try:
            model(**examples)
        except Exception:  # the model's own limit, whatever it raises
            return False
        finally:
            for part, own in buffers.items():
                part._buffers.update(own)
    return True


def _where(source: Any) -> list[str]:
    frame = source.framework_loc
    own = isinstance(frame, FrameSummary) and is_authors(frame.filename)
    return [f"at {place(frame.filename, frame.lineno or 0)}"] if own else []
