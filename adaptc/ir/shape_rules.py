"""Operations whose shapes torch computes by a loop or a choice that fixes a size: here they need none."""

# torch's table of what an operation does in a trace has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

aten = torch.ops.aten
KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextmanager
def shape_rules() -> Generator[None]:
    """Let these operations give only shapes in a trace within a `with` block. Real tensors are computed as ever.

    Torch's own rule runs a loop over the steps of a recurrent layer, which fixes their number, and compares sizes to
    choose the order of a chain of matrix products.
    """
    kernels: dict[Any, dict[Any, Any]] = {target: dict(target.py_kernels) for target in RULES}
    for target, rule in RULES.items():
        _give_kernels(target, {**kernels[target], **dict.fromkeys(KEYS, rule)})
    try:
        yield
    finally:
        for target, earlier in kernels.items():
            _give_kernels(target, earlier)


def _give_kernels(target: Any, kernels: dict[Any, Any]) -> None:
    """Replace what an operation does in a trace."""
    target.py_kernels.clear()
    target.py_kernels.update(kernels)
    target._dispatch_cache.clear()


def _recurrent(
    x: torch.Tensor,
    states: torch.Tensor | Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """The outputs of every step, laid out with time first, and the last states, as empty tensors."""
    last = [states] if isinstance(states, torch.Tensor) else list(states)
    steps = x.transpose(0, 1) if batch_first else x
    output = steps.new_empty((*steps.shape[:-1], last[0].shape[-1] * (2 if bidirectional else 1)))
    return (output.transpose(0, 1) if batch_first else output, *(torch.empty_like(state) for state in last))


def _chain(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The product of a chain of matrices, the first and the last of which may be vectors, as an empty tensor."""
    first, last = tensors[0], tensors[-1]
    return first.new_empty((*first.shape[:-1], *last.shape[1:]))


RULES: Mapping[Any, Callable[..., Any]] = {
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
    aten.linalg_multi_dot.default: _chain,
}
"""Operation -> what gives its shapes."""
