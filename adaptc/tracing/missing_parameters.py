"""Parameters that a Hugging Face checkpoint does not hold, initialised as transformers does it."""

# Parameters are replaced in torch's own dicts: setting an attribute would register a fake one anew.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.checkpoints.huggingface_weights import spellings, stored_tensors
from adaptc.weights import Held, Weight, seeded


def missing_parameters(model: nn.Module, directory: Path, packed: Mapping[str, Weight]) -> list[str]:
    """The names of the parameters that a checkpoint holds neither as floats nor packed."""
    stored = stored_tensors(directory)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [
        name
        for name, keys in spellings(model).items()
        if name not in buffers and name not in packed and not any(key in stored for key in keys)
    ]


def initialised(model: Any, names: list[str], seed: int) -> dict[str, Weight]:
    """Initialise parameters that a checkpoint does not hold, such as a new head, as transformers does.

    Args:
        model: a model of transformers; its parameters are fake, and stay so.
        names: the parameters.
        seed: with the name of the module, it determines the random numbers.

    Returns:
        Name -> weight, for every one of `names`.
    """
    weights: dict[str, Weight] = {}
    for module_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module: nn.Module = model.get_submodule(module_name)
        fakes = dict(module._parameters)
        for key, parameter in fakes.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
        with drawing_from(seeded(seed, module_name)):
            model._init_weights(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and f"{module_name}.{key}" in names:
                weights[f"{module_name}.{key}"] = Held(parameter.detach())
        module._parameters.update(fakes)
    return weights


@contextmanager
def drawing_from(generator: torch.Generator) -> Generator[None]:
    """Let torch draw the random numbers of a generator within a `with` block, and its own ones after it."""
    state = torch.random.get_rng_state()
    torch.random.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
