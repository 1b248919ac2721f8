"""Recurrent layers, LSTM, GRU and RNN: one operation for all steps, whose shapes need no loop over them."""

# torch's table of what an operation does in a trace has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

aten = torch.ops.aten
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""The operations of recurrent layers, on sequences of one length."""
KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextmanager
def recurrent_shapes() -> Generator[None]:
    """Let recurrent layers give only shapes in a trace within a `with` block.

    Torch's own rule runs a loop over the steps, which fixes their number. Real tensors are computed as ever.
    """
    kernels: dict[Any, dict[Any, Any]] = {target: dict(target.py_kernels) for target in RECURRENT}
    for target in RECURRENT:
        _give_kernels(target, dict.fromkeys(KEYS, _shapes))
    try:
        yield
    finally:
        for target, earlier in kernels.items():
            _give_kernels(target, earlier)


def _give_kernels(target: Any, kernels: dict[Any, Any]) -> None:
    """Replace what an operation does in a trace."""
    target.py_kernels.update(kernels)
    target._dispatch_cache.clear()


def _shapes(
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
