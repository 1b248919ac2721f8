"""Wrappers that run a model on other devices, faster, or in another precision: the model inside is traced."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn

from adaptc.errors import TraceError

INNER = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
}
"""Full name of a wrapper's class -> its attribute that holds the model. By name, so that no library is imported."""
TUNED = "peft.tuners.tuners_utils.BaseTuner"
"""The class of PEFT that puts the layers of an adapter into a model."""
MIXED = "_original_forward"
"""The attribute under which accelerate keeps the forward that it runs in mixed precision."""


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside of all known wrappers, the outermost one first taken off; nothing of the caller's changes.

    Returns:
        The model, and a note for each wrapper.

    Raises:
        TraceError: a PEFT model has virtual tokens, which are no part of the model inside.
    """
    notes: list[str] = []
    while (name := _wrapper(model)) is not None:
        _check_virtual_tokens(model)
        notes.append(_note(model, name))
        model = getattr(model, INNER[name])
    if MIXED in model.__dict__ and "forward" in model.__dict__:
        notes.append(
            "mixed precision by accelerate is left out: the products compute in the dtype of the weights"
        )
        model = copy.copy(model)
        del model.__dict__["forward"], model.__dict__[MIXED]
    if cast(Any, model)._compiled_call_impl is not None:
        notes.append("model.compile() is left out: the model itself is traced")
        model = copy.copy(model)
        model._compiled_call_impl = None
    return model, tuple(notes)


def _wrapper(model: nn.Module) -> str | None:
    """The name in `INNER` of a model's class; None for a model that is no such wrapper."""
    classes = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    return next((name for name in classes if name in INNER), None)


def _note(model: nn.Module, name: str) -> str:
    if name == TUNED:
        return (
            f"the layers of PEFT's {type(model).__name__} are part of the base that is traced: to fold that adapter, "
            "or to name the base's own layers, save it by save_pretrained, hand in model.unload(), and give its "
            "directory as `adapter`"
        )
    return f"the model inside of {type(model).__name__} is traced: its names are without `{INNER[name]}.`"


def _check_virtual_tokens(model: nn.Module) -> None:
    """Check that a PEFT model is its inner model.

    Raises:
        TraceError: it puts virtual tokens in front of the inputs.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise TraceError(
            f"{type(model).__name__} puts virtual tokens in front of its model's inputs, and they are no part of it",
            "save it by save_pretrained, hand in its base_model, and give the directory as `adapter` in the spec",
        )
