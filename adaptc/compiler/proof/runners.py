"""The sides of a proof: whatever runs batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils import _pytree as pytree

from adaptc.ir.interpreter import Batch, Batches, Outcome, Run
from adaptc.ir.state import stateless
from adaptc.progress.steps import each

LOG = logging.getLogger(__name__)
Call = Callable[[Batch], Sequence[torch.Tensor]]


class Runner(Protocol):
    """One side of a proof: something that runs batches."""

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        ...


@dataclass(frozen=True)
class BatchRunner:
    """A runner that calls a function on one batch after the other; an exception is that batch's outcome.

    Attributes:
        call: gives the outputs of a batch.
    """

    call: Call

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        labels = each(LOG, "running the program", list(batches), "batches", logging.DEBUG)
        return Run(batches, {name: self._one(batches[name]) for name in labels})

    def _one(self, batch: Batch) -> Outcome:
        try:
            return list(self.call(batch))
        except Exception as error:
            return error


def module_call(module: torch.nn.Module, device: str = "cpu") -> Call:
    """A function that runs a module in evaluation mode on its `device`, and gives its output tensors on the CPU.

    The module's buffers and attributes are as before after each call. torch's fused path of transformer layers is off,
    as in a trace: it gives zeros at padding.
    """

    def call(tensors: Batch) -> list[torch.Tensor]:
        with evaluating(module), stateless(module), unfused(), torch.no_grad():
            result = module(**{name: tensor.to(device) for name, tensor in tensors.items()})
        return [leaf.cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    return call


@contextmanager
def evaluating(module: torch.nn.Module) -> Generator[None]:
    """A context in evaluation mode; afterwards every submodule has its earlier mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def unfused() -> Generator[None]:
    """A context without torch's fused path of transformer layers, in which nothing can be adapted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
