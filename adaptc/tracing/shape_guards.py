"""Check that a trace holds for every size of a named dimension: the model must not branch on its shapes."""

# torch gives its symbolic sizes and a module's buffers under private names only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from traceback import FrameSummary
from typing import Any, cast

import torch
from sympy import Equality, false  # pyright: ignore[reportMissingTypeStubs]
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.author_lines import is_model_code, source_line
from adaptc.tracing.same_trace import is_same_trace

FACTORS = (2, 40, 1000)
"""How much longer than traced each named dimension is assumed to be.

Chosen so that an odd size becomes even, and that usual limits (a window, a table of positions) are exceeded.
"""


Trace = Callable[[Mapping[str, int]], torch.export.ExportedProgram]
"""Traces a model with inputs of these sizes: name of a dimension -> size."""


@dataclass(frozen=True)
class Branch:
    """A size at which a model takes another branch than it was traced with.

    Attributes:
        sizes: name of a dimension -> size, one of them larger.
        error: what is told.
    """

    sizes: Mapping[str, int]
    error: TraceError


def for_every_size(
    model: nn.Module, trace: Trace, inputs: Sequence[InputSpec], sizes: Mapping[str, int]
) -> torch.export.ExportedProgram:
    """The trace of a model: every condition on a named dimension, under which it was made, holds at larger sizes.

    A size of the examples may be small by chance, such as one whose half is 1, or that is a single chunk, which torch
    takes for a size that broadcasts. So where a condition fails, the model is traced at the larger size, and that trace
    is taken if it is what the model computes at the smaller sizes too.

    Args:
        model: the model.
        trace: traces it.
        inputs: the inputs as specified.
        sizes: name of a dimension -> the size to trace with.

    Raises:
        TraceError: the model runs at a larger size, but takes another branch there.
    """
    program = trace(sizes)
    branch = _branch(model, program, inputs, sizes)
    if branch is None:
        return program
    try:
        again = trace(branch.sizes)
    except Exception as error:  # such as a loop that runs as often as there are chunks
        raise branch.error from error
    if _operations(again, inputs, sizes) != _operations(program, inputs, sizes):
        smaller = {symbol: sizes[dim] for symbol, dim in _symbols(again, inputs).items()}
        if not is_same_trace(model, again, _examples(model, inputs, sizes), smaller):
            raise branch.error
    if _branch(model, again, inputs, branch.sizes) is not None:
        raise branch.error
    return again


def _operations(
    program: torch.export.ExportedProgram, inputs: Sequence[InputSpec], sizes: Mapping[str, int]
) -> list[str]:
    """The operations of a program with their arguments, its sizes as the numbers that they are at these sizes."""
    values = {symbol: sizes[dim] for symbol, dim in _symbols(program, inputs).items()}
    operands: dict[fx.Node, Any] = {}
    lines: list[str] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            number = cast(Any, value).node.expr.subs(values)
            operands[node] = int(number) if number.is_Integer else str(number)
        elif node.op != "call_function" or value is not None:
            operands[node] = f"%{len(lines)}"
            arguments: Any = map_arg((node.args, dict(node.kwargs)), lambda n: operands.get(n, "?"))
            lines.append(f"{node.op} {node.target} {arguments}")
    return lines


def _branch(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    inputs: Sequence[InputSpec],
    sizes: Mapping[str, int],
) -> Branch | None:
    """The first larger size at which a condition of a trace fails; None if there is none.

    A condition may fail where the model itself refuses that size, such as positions beyond its table, and where it
    changes nothing that is computed. Both are tried on fake tensors.

    Args:
        model: the model.
        program: its trace.
        inputs: the inputs as specified.
        sizes: name of a dimension -> the size it was traced with.
    """
    symbols = _symbols(program, inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    for name, larger in _larger(sizes, _longest(model)):
        values_of = {symbol: larger[dim] for symbol, dim in symbols.items()}
        failed = next((guard for guard in guards if guard.expr.subs(values_of) is false), None)
        if failed is None:
            continue
        examples = _examples(model, inputs, larger)
        if not _runs(model, examples) or is_same_trace(model, program, examples, values_of):
            continue
        spec = next(spec for spec in inputs if name in spec.dims)
        fixed = ", ".join(str(sizes[name] if dim == name else dim) for dim in spec.dims)
        error = TraceError(
            f"{type(model).__name__} could not be traced: it takes another branch at {name}={larger[name]} than at "
            f"{name}={sizes[name]}, where `{failed.expr.subs(symbols)}`",
            *_location(failed.sloc),
            "expected the same operations for every size of a named dimension",
            f"fix that dimension by a number, such as {spec.name}: {spec.dtype}[{fixed}], or move the choice out of "
            "forward",
        )
        return Branch(larger, error)
    return None


def fixing_line(mode: FakeTensorMode | None, sizes: Collection[int]) -> tuple[str, int] | None:
    """File and line of the author's that fixed a dimension while a model was traced.

    Args:
        mode: the fake-tensor mode of the trace.
        sizes: the sizes that named dimensions were traced with.
    """
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    for guard in guards:
        frame: Any = guard.sloc.framework_loc
        fixes = isinstance(guard.expr, Equality) and any(size in guard.expr.args for size in sizes)
        if fixes and isinstance(frame, FrameSummary) and is_model_code(frame.filename):
            return frame.filename, frame.lineno or 0
    return None


def _symbols(program: torch.export.ExportedProgram, inputs: Sequence[InputSpec]) -> dict[Any, str]:
    """torch's symbol of each size -> the name of the dimension."""
    specs = {spec.name: spec for spec in inputs}
    symbols: dict[Any, str] = {}
    for node in program.graph.nodes:
        spec = specs.get(str(node.target)) if node.op == "placeholder" else None
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True) if spec else ():
            if isinstance(size, torch.SymInt) and isinstance(dim, str):
                expression = cast(Any, size).node
                symbols |= {s: dim for s in (expression._expr, expression.expr) if s.is_Symbol}
    return symbols


def _larger(sizes: Mapping[str, int], longest: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each dimension, and the sizes with that one made larger, up to `longest`."""
    for factor in FACTORS:
        for name, size in sizes.items():
            yield name, {**sizes, name: max(size, min(size * factor, longest))}


def _longest(model: nn.Module) -> int:
    """The longest sequence that a Hugging Face configuration allows; beyond it some models make larger tables."""
    config = getattr(model, "config", None)
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_source_positions"))
    return min([length for length in lengths if isinstance(length, int)], default=sys.maxsize)


def _examples(
    model: nn.Module, inputs: Sequence[InputSpec], sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Fake inputs of these sizes, of the same mode as the model's weights where those are fake."""
    fake = (tensor for tensor in model.parameters() if isinstance(tensor, FakeTensor))
    mode = next((tensor.fake_mode for tensor in fake), None) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return {
            spec.name: torch.empty(
                [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims],
                dtype=getattr(torch, spec.dtype),
            )
            for spec in inputs
        }


def _runs(model: nn.Module, examples: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model runs on fake inputs; its buffers stay as they are."""
    mode = next(tensor.fake_mode for tensor in examples.values() if isinstance(tensor, FakeTensor))
    buffers = {module: dict(module._buffers) for module in model.modules()}
    with mode, torch.no_grad():
        try:
            model(**examples)
        except Exception:  # the model's own limit, whatever it raises
            return False
        finally:
            for module, tensors in buffers.items():
                module._buffers.update(tensors)
    return True


def _location(source: Any) -> list[str]:
    """The note that names the line of the model where a condition arose; none where it is torch's own line."""
    frame = source.framework_loc
    if not isinstance(frame, FrameSummary) or not is_model_code(frame.filename):
        return []
    return [f"at {source_line(frame.filename, frame.lineno or 0)}"]
