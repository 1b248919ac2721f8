"""Wrappers that run a model on other devices, faster, or in another precision: the model inside is traced."""

# Whether a module compiles itself is in an attribute without a public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any, cast

from torch import nn

from adaptc.errors import TraceError

INNER = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
}
"""Full name of a wrapper's class -> its attribute that holds the model. By name, so that no library is imported."""
SHARDED = (
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule",
)
"""Full names of classes whose parts hold a share of the weights, in another shape."""
TUNED = "peft.tuners.tuners_utils.BaseTuner"
"""The class of PEFT that puts the layers of an adapter into a model."""
MIXED = "_original_forward"
"""The attribute under which accelerate keeps the forward that it runs in mixed precision."""


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside of all known wrappers, the outermost one first taken off; nothing of the caller's changes.

    Returns:
        The model, and a note for each wrapper.

    Raises:
        TraceError: a PEFT model has virtual tokens, which are no part of the model inside; or weights are sharded or
            offloaded, so that the model does not hold them.
    """
    notes: list[str] = []
    for part in model.modules():
        _check_whole(part)
    while (name := _of_class(model, INNER)) is not None:
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


def _of_class(model: nn.Module, names: Container[str]) -> str | None:
    """The name among these of a model's class, or of one that it inherits from; None if there is none."""
    classes = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    return next((name for name in classes if name in names), None)


def _check_whole(part: nn.Module) -> None:
    """Check that a part of a model holds its weights.

    Raises:
        TraceError: it does not.
    """
    if _of_class(part, SHARDED) is not None:
        raise TraceError(
            f"{type(part).__name__} shards its weights",
            "gather them by torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, "
            "and load them into a model without FSDP",
        )
    hooks = [getattr(part, "_hf_hook", None), *getattr(getattr(part, "_hf_hook", None), "hooks", ())]
    if any(getattr(hook, "offload", False) for hook in hooks):
        raise TraceError(
            f"accelerate has offloaded the weights of {type(part).__name__}",
            "load the model without device_map and offloading; no compile needs all its weights in memory at once",
        )


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
