"""Torch's own operations as modules around an adapted linear layer, with the inputs that torch tests them with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class UnusableError(Exception):
    """A call that PyTorch itself does not take in this setting, or whose results say nothing."""


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        name: of the operation, as torch's database has it.
        number: of the call: 0 for the first that is taken.
        call: the function.
        arguments: its positional arguments, and those by keyword.
    """

    name: str
    number: int
    call: Callable[..., Any]
    arguments: Arguments


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """Up to two calls of every operation of torch's database: the one with most axes, and one with other options.

    Args:
        names: of the operations; all if empty.
    """
    for name, info in _database():
        if not names or name in names:
            for number, sample in enumerate(_chosen(info)):
                yield Case(name, number, info.op, ((sample.input, *sample.args), dict(sample.kwargs)))


def operation_names() -> list[str]:
    """Every operation of torch's database."""
    return list(dict.fromkeys(name for name, _ in _database()))


def _database() -> list[tuple[str, Any]]:
    """The entries of torch's database with the names of their operations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [(".".join(part for part in (info.name, info.variant_test_name) if part), info) for info in op_db]


def _chosen(info: Any) -> list[Any]:
    """The calls that are taken of an operation, with float32 where it takes it."""
    supported = info.supported_dtypes("cpu")
    dtype = next((d for d in (torch.float32, torch.int64, torch.bool) if d in supported), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(info.sample_inputs("cpu", dtype))
    usable = [sample for sample in samples if all(t.numel() for t in _tensors(sample))]
    usable.sort(key=lambda sample: -max((min(t.dim(), 4) for t in _tensors(sample)), default=0))
    return usable[:1] + [sample for sample in usable[1:] if _options(sample) != _options(usable[0])][:1]


def _tensors(sample: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _options(sample: Any) -> str:
    """The arguments of a call that are no tensors, as text."""
    return repr(
        pytree.tree_map(
            lambda leaf: leaf.dtype if isinstance(leaf, torch.Tensor) else leaf, (sample.args, sample.kwargs)
        )
    )


def in_core_operations(case: Case) -> Case:
    """The same call in torch's core operations, of which its own are made.

    Raises:
        UnusableError: torch cannot trace it.
    """

    class Alone(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            return case.call(*args, **kwargs)

    leaves, structure = pytree.tree_flatten(case.arguments)
    examples = tuple(leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor))
    try:
        program = torch.export.export(Alone(), examples, strict=False).run_decompositions()
    except Exception as error:
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    traced = program.module(check_guards=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return traced(*given)

    vars(call)["operations"] = core_operations(traced)
    return replace(case, call=call)


def core_operations(module: Any) -> list[str]:
    """The names of the core operations that a traced module runs."""
    targets = {node.target for node in module.graph.nodes if node.op == "call_function"}
    return sorted(str(t) for t in targets if torch.Tag.core in getattr(t, "tags", ()))


class Around(nn.Module):
    """An operation on tensors that an adapted layer gives, each moved into the range of values of the call.

    Args:
        case: the call.
        computed: the positions, among the leaves of the arguments, of the tensors that are computed.
        scaled: let these tensors be those of the call, multiplied by a number that the layer gives: an operation such
            as `cholesky` takes few others.
    """

    def __init__(self, case: Case, computed: Sequence[int], scaled: bool):
        super().__init__()
        self.layer, self.call, self.scaled = nn.Linear(1, 4), case.call, scaled
        leaves, self.structure = pytree.tree_flatten(case.arguments)
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.ranges = {i: (float(leaves[i].min()), float(leaves[i].max()), leaves[i].dtype) for i in computed}
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and (scaled or position not in computed):
                self.register_buffer(f"leaf_{position}", leaf.detach())

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that the operation gives, complex ones as pairs, and a number of each layer's output."""
        leaves: list[Any] = [getattr(self, f"leaf_{i}", leaf) for i, leaf in enumerate(self.leaves)]
        shares = [(torch.tanh(self.layer(x.unsqueeze(-1))).mean(-1) + 1) / 2 for x in inputs]
        for (position, (low, high, dtype)), share in zip(self.ranges.items(), shares, strict=True):
            value = leaves[position] * (1 + share.mean() / 8) if self.scaled else low + (high - low) * share
            leaves[position] = value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        results = pytree.tree_leaves(self.call(*args, **kwargs))
        tensors = [leaf for leaf in results if isinstance(leaf, torch.Tensor)]
        real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
        return *real, *(share.sum() for share in shares)


@dataclass(frozen=True)
class Setting:
    """A module of a case, its inputs, and what it gives on others.

    Attributes:
        model: the module.
        examples: inputs of the sizes that it is traced with.
        dynamic: name of an input -> its dynamic axis and the name of it.
        inputs: other inputs, of other sizes along the dynamic axes.
        expected: what the module gives on these.
    """

    model: Around
    examples: tuple[torch.Tensor, ...]
    dynamic: dict[str, dict[int, str]]
    inputs: tuple[torch.Tensor, ...]
    expected: list[torch.Tensor]

    @property
    def names(self) -> list[str]:
        """The names of the inputs."""
        return [f"inputs_{i}" for i in range(len(self.examples))]


def setting(case: Case, dynamic: bool) -> Setting:
    """A case with an axis dynamic, or all sizes fixed: the first way of several that PyTorch itself runs.

    Raises:
        UnusableError: it runs none of them.
    """
    leaves = pytree.tree_leaves(case.arguments)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if any(leaves[i].layout != torch.strided for i in tensors):
        raise UnusableError("a sparse tensor")
    real = [i for i in tensors if leaves[i].dtype not in (torch.bool, torch.complex64)]
    every = [i for i in real if i == tensors[0] or leaves[i].is_floating_point()]
    if not every:
        raise UnusableError("no tensor can be computed")
    ways = [(every, False), (every[:1], False)] + [(every, True), (every[:1], True)] * (not dynamic)
    failures: list[UnusableError] = []
    for computed, scaled in ways:
        for axes in _dynamic_axes([leaves[i] for i in computed]) if dynamic else [{}]:
            try:
                return _made(Around(case, computed, scaled).eval(), [leaves[i] for i in computed], axes)
            except UnusableError as error:
                failures.append(error)
    raise failures[0] if failures else UnusableError("no axis")


def _dynamic_axes(templates: Sequence[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Ways to choose the dynamic axis of some tensors: position -> axis.

    The first or the last axis of the first tensor, and of every other with as many there, or of no other.
    """
    first = templates[0]
    for axis in (0, -1) if first.dim() > 1 else (0,) * first.dim():
        same = [i for i, t in enumerate(templates) if t.dim() and t.shape[axis] == first.shape[axis]]
        for chosen in [same, [0]] if len(same) > 1 else [[0]]:
            yield {i: axis % templates[i].dim() for i in chosen}


def _made(model: Around, templates: Sequence[torch.Tensor], axes: dict[int, int]) -> Setting:
    """A module with inputs of the sizes of these tensors, and of twice the size along the dynamic axes.

    Raises:
        UnusableError: PyTorch does not run it, or its results say nothing.
    """
    torch.manual_seed(0)
    examples = tuple(torch.randn(t.shape) for t in templates)
    inputs = tuple(
        torch.randn([size * 2 if axes.get(i) == axis else size for axis, size in enumerate(x.shape)])
        for i, x in enumerate(examples)
    )
    randomness = _Randomness()
    try:
        with randomness:
            traced = model(*examples)
            expected = [result.detach() for result in model(*inputs)]
    except Exception as error:
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    if randomness.drawn:
        raise UnusableError("it draws random numbers")
    if len(expected) == len(inputs):
        raise UnusableError("it gives no tensor")
    if any(t.is_floating_point() and not t.isfinite().all() for t in (*traced, *expected)):
        raise UnusableError("its results are not finite")
    dynamic = {f"inputs_{i}": {axis: "size"} for i, axis in axes.items()}
    return Setting(model, examples, dynamic, inputs, expected)


class _Randomness(TorchDispatchMode):
    """Tells whether an operation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def largest_error(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """The largest error over the largest value of a result; infinite where shapes differ, or one is not finite."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return math.inf
    errors = [0.0]
    for left, right in zip(expected, got, strict=True):
        difference = (left.double() - right.double()).abs()
        if left.numel():
            error = float(difference.max() / left.double().abs().max().clamp(min=1e-6))
            errors.append(math.inf if math.isnan(error) else error)
    return max(errors)
