"""The training loop's part of a method: penalties, pruning of ranks, drawing of masks, groups for an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.checkpoints.module_adapters import records, tensors_of
from adaptc.checkpoints.records import AdapterRecord
from adaptc.errors import AdaptcError
from adaptc.methods.method import METHODS
from adaptc.methods.training_rule import TrainingRule
from adaptc.optional import optional

if TYPE_CHECKING:
    from transformers import TrainerCallback


class TrainingStep:
    """One step of training. Call it in place of `optimizer.step()`.

        step = adaptc.TrainingStep(module, steps=1000)
        for batch in batches:
            module(**batch).loss.backward()
            step(optimizer)
            optimizer.zero_grad()

    It adds the gradients of the methods' penalties, steps the optimizer, and calls the methods' training hooks, which
    prune ranks or draw masks. A method without a penalty or a hook needs none of this. With transformers' Trainer use
    `Trainer(..., callbacks=[step.callback()])` instead. With a gradient scaler call `scaler.unscale_(optimizer)`,
    `step.before()`, `scaler.step(optimizer)`, `step.after()`.

    Args:
        module: a module that adaptc made; `torch.compile` or DistributedDataParallel may wrap it.
        steps: the number of optimizer steps of the whole training. Methods with a schedule need it.

    Attributes:
        number: how many steps have been taken.

    Raises:
        AdaptcError: a method needs the number of steps, and it was not given.
    """

    def __init__(self, module: nn.Module, steps: int | None = None):
        self.number = 0
        plain = _unwrapped(module)
        tensors = tensors_of(plain)
        self._rules = [
            rule for record in records(plain) if (rule := _rule(record, tensors, steps)) is not None
        ]
        if self._rules:
            plain.register_forward_pre_hook(self._forward)

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one step: `before`, the optimizer's own step, `after`."""
        self.before()
        optimizer.step()
        self.after()

    def penalty(self) -> torch.Tensor:
        """The sum of the methods' penalties, a scalar. `before` adds its gradient: do not add it to the loss."""
        penalties = [penalty for rule in self._rules if (penalty := rule.penalty()) is not None]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def before(self) -> None:
        """Call it when the gradients are computed, before the optimizer's step."""
        self.number += 1
        penalty = self.penalty()
        if penalty.requires_grad:
            torch.autograd.backward(penalty)
        with torch.no_grad():
            for rule in self._rules:
                rule.before(self.number)

    def after(self) -> None:
        """Call it after the optimizer's step."""
        with torch.no_grad():
            for rule in self._rules:
                rule.after(self.number)

    def callback(self) -> TrainerCallback:
        """A callback for transformers' Trainer that calls `before` and `after` around each optimizer step."""
        step, base = self, optional("transformers").TrainerCallback

        class Callback(base):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                step.before()

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                step.after()

        return Callback()

    def _forward(self, module: nn.Module, _: object) -> None:
        with torch.no_grad():
            for rule in self._rules:
                rule.forward(module.training)


def parameter_groups(module: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """The trained parameters in two groups for an optimizer, the outer factors with a larger learning rate.

    LoRA+ (Hayou et al. 2024, section 4): B, which starts at zero, learns faster than A.

    Args:
        module: a module that adaptc made; `torch.compile` or DistributedDataParallel may wrap it.
        lr: the learning rate of all other parameters.
        ratio: the outer factors' learning rate over `lr`; 16 is what the paper recommends.

    Returns:
        Groups with the keys `params` and `lr`; an empty group is left out.

    Raises:
        AdaptcError: no method in the module has outer factors.
    """
    plain = _unwrapped(module)
    fast = {
        tensor.name
        for record in records(plain)
        for tensor in record.tensors
        if tensor.argument in record.instance.fast
    }
    if not fast:
        trained = ", ".join(dict.fromkeys(record.method for record in records(plain)))
        others = ", ".join(sorted(name for name, cls in METHODS.items() if cls.fast))
        raise AdaptcError(f"{trained} has no outer factors to train faster; methods that have: {others}")
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    slow = [p for name, p in named.items() if name not in fast]
    groups = [
        {"params": slow, "lr": lr},
        {"params": [named[n] for n in named if n in fast], "lr": ratio * lr},
    ]
    return [group for group in groups if group["params"]]


def _unwrapped(module: nn.Module) -> Any:
    """The module that adaptc made, without what `torch.compile` and DistributedDataParallel wrap around it."""
    while not hasattr(module, "meta"):
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _rule(
    record: AdapterRecord, tensors: Mapping[str, torch.Tensor], steps: int | None
) -> TrainingRule | None:
    sites = record.sites(tensors)
    try:
        return record.instance.rule(list(sites.values()), steps)
    except ValueError as error:
        raise AdaptcError(f"{record.method}: {error}") from error
