"""What methods do while they are trained, besides their gradients: penalties, ranks given up, masks drawn."""

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

if TYPE_CHECKING:
    from transformers import TrainerCallback


class TrainingStep:
    """One step of a training, to be called in place of `optimizer.step()`.

        step = adaptc.TrainingStep(module, steps=1000)
        for batch in batches:
            module(**batch).loss.backward()
            step(optimizer)
            optimizer.zero_grad()

    It adds the gradients of the methods' penalties, steps the optimizer, and lets the methods do what they do at each
    step (prune ranks, draw masks). Methods that do nothing of the kind are left alone. With transformers' Trainer
    use `Trainer(..., callbacks=[step.callback()])` instead; with a gradient scaler `scaler.unscale_(optimizer)`,
    `step.before()`, `scaler.step(optimizer)`, `step.after()`.

    Args:
        module: a module that adaptc made, or such a one behind `torch.compile` or DistributedDataParallel.
        steps: how many optimizer steps the training has; methods with a schedule need it.

    Raises:
        AdaptcError: a method needs the number of steps, and there is none.
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
        """Step the optimizer, and the methods around it."""
        self.before()
        optimizer.step()
        self.after()

    def penalty(self) -> torch.Tensor:
        """The sum of all penalties, as it stands; `before` adds its gradient, so it need not be in the loss."""
        found = [penalty for rule in self._rules if (penalty := rule.penalty()) is not None]
        return torch.stack(found).sum() if found else torch.zeros(())

    def before(self) -> None:
        """To be called when the gradients are there, before the optimizer's step."""
        self.number += 1
        penalty = self.penalty()
        if penalty.requires_grad:
            penalty.backward()
        with torch.no_grad():
            for rule in self._rules:
                rule.before(self.number)

    def after(self) -> None:
        """To be called after the optimizer's step."""
        with torch.no_grad():
            for rule in self._rules:
                rule.after(self.number)

    def callback(self) -> TrainerCallback:
        """The same for transformers' Trainer."""
        from transformers import TrainerCallback

        step = self

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                step.before()

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                step.after()

        return Callback()

    def _forward(self, module: nn.Module, _: Any) -> None:
        with torch.no_grad():
            for rule in self._rules:
                rule.forward(module.training)


def parameter_groups(module: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """What is trained, in groups for an optimizer: the outer factors with learning rate `ratio * lr`, the rest with lr.

    LoRA+ (Hayou et al. 2024, section 4): B, which starts at zero, learns faster than A.

    Raises:
        AdaptcError: nothing that is trained has such factors.
    """
    plain = _unwrapped(module)
    fast = {
        tensor.name
        for record in records(plain)
        for tensor in record.tensors
        if tensor.argument in record.instance.fast
    }
    if not fast:
        held = ", ".join(dict.fromkeys(record.method for record in records(plain)))
        known = ", ".join(sorted(name for name, cls in METHODS.items() if cls.fast))
        raise AdaptcError(f"{held} has no outer factors that could learn faster; such methods are {known}")
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    slow = [p for name, p in named.items() if name not in fast]
    groups = [
        {"params": slow, "lr": lr},
        {"params": [named[n] for n in named if n in fast], "lr": ratio * lr},
    ]
    return [group for group in groups if group["params"]]


def _unwrapped(module: nn.Module) -> Any:
    """The module itself, from inside of `torch.compile`'s and DistributedDataParallel's."""
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
