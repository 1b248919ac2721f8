"""What PEFT, as it is installed, leaves out of a checkpoint when it loads it into a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptc.checkpoints.config_file import CONFIG, read_config
from adaptc.optional import MissingPackageError, optional

CONVERTED = "LORA"
"""The type of adapter whose configurations PEFT converts to newer names."""


def left_out(directory: Path, modules: Sequence[str], model: Any) -> tuple[str, ...]:
    """What a person must know of a checkpoint who loads it with PEFT.

    PEFT converts a configuration for types of models whose experts transformers has made one tensor, and takes dense
    layers that are named as experts were for experts. Their tensors are then left out, whoever wrote them.

    Args:
        directory: a checkpoint of PEFT's.
        modules: the modules that it adapts.
        model: the base, a model of transformers; None for another, of which PEFT converts nothing.

    Returns:
        A sentence that names the modules; nothing where PEFT reads them all, or is not installed to say so.
    """
    if model is None or read_config(directory / CONFIG).get("peft_type") != CONVERTED:
        return ()
    table: Any = optional("transformers.conversion_mapping")
    if table.get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return ()
    try:
        conversion: Any = optional("peft.utils.transformers_weight_conversion")
        tuners: Any = optional("peft.tuners.tuners_utils")
        peft: Any = optional("peft")
    except MissingPackageError:
        return ()
    config = peft.PeftConfig.from_pretrained(str(directory))
    try:
        conversion.convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        return (f"PEFT {peft.__version__} refuses this adapter for {model.config.model_type}: {error}",)
    missing = [name for name in modules if not tuners.check_target_module_exists(config, name)]
    if not missing:
        return ()
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return (
        f"PEFT {peft.__version__} leaves out the adapters of {missing[0]}{more} when it loads this checkpoint: it "
        f"takes layers of {model.config.model_type} with these names for experts; adaptc reads all of them",
    )
