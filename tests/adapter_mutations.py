"""Random damage to the files of an adapter: its configuration, its tensors, and the bytes of both; by a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        8,
        64,
        0.5,
        2.0,
        1e30,
        10**40,
        "",
        "x",
        "2",
        "none",
        "all",
        "lora_only",
    ),
    *("lin0", "lin1", "emb", "all-linear", ".*", "(", "lin0|lin1", "re:lin0"),
    *(
        [],
        [""],
        ["lin0"],
        ["lin1"],
        ["lin0", "lin1"],
        ["emb", "lin0"],
        ["norm"],
        ["nowhere"],
        [0],
        [1, 2],
        [None],
    ),
    *({}, {"lin0": 2}, {"lin1": 3}, {"lin.": 2}, {"(": 2}, {"lin0": None}, {"lin0": "x"}, {"a": {"b": []}}),
]
"""What a key of a configuration is set to."""
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
"""What a tensor is cast to."""
Tensors = dict[str, torch.Tensor]


def mutate(directory: Path, seed: int) -> str:
    """Change the files of an adapter in one way, or in two.

    Returns:
        what was done.
    """
    random = Random(seed)
    changes = random.choices((_config, _tensors, _bytes), (5, 5, 2), k=random.choice((1, 1, 2)))
    try:
        return "; ".join(change(directory, random) for change in changes)
    except Exception as error:  # the first change left nothing that the second could read
        return f"then unreadable: {type(error).__name__}"


def _config(directory: Path, random: Random) -> str:
    path = directory / CONFIG
    config: dict[str, Any] = json.loads(path.read_text())
    key = random.choice(sorted(config))
    kind = random.choices(("set", "drop", "misspell", "add", "near"), (8, 2, 1, 1, 3))[0]
    value = random.choice(VALUES)
    if kind == "near":  # a value of the type that is there
        alike = [v for v in VALUES if type(v) is type(config[key])]
        value = random.choice(alike or VALUES)
    if kind in ("drop", "misspell"):
        taken = config.pop(key)
        if kind == "misspell":
            config[key[:-1] if random.random() < 0.5 else key + "s"] = taken
    else:
        config[f"new_{key}" if kind == "add" else key] = value
    path.write_text(json.dumps(config))
    return f"{kind} {key} {value!r}" if kind in ("set", "add", "near") else f"{kind} {key}"


def _tensors(directory: Path, random: Random) -> str:
    path = directory / TENSORS
    tensors = load_file(path)
    key = random.choice(sorted(tensors))
    change = random.choice(TENSOR_CHANGES)
    change(tensors, key, random)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path)
    return f"{change.__name__} {key}"


def drop(tensors: Tensors, key: str, random: Random) -> None:
    del tensors[key]


def drop_most(tensors: Tensors, key: str, random: Random) -> None:
    for other in [*tensors]:
        if random.random() < 0.7:
            del tensors[other]


def rename(tensors: Tensors, key: str, random: Random) -> None:
    parts = key.split(".")
    at = random.randrange(len(parts))
    parts[at : at + 1] = random.choice(([], [parts[at], "default"], [parts[at] + "x"], ["module", parts[at]]))
    tensors[".".join(parts) or "x"] = tensors.pop(key)


def lengthen_all(tensors: Tensors, key: str, random: Random) -> None:
    part = random.choice(("_orig_mod.", "module.", "model.", "base_model.model."))
    for other in [*tensors]:
        tensors[part + other] = tensors.pop(other)


def exchange(tensors: Tensors, key: str, random: Random) -> None:
    other = random.choice(sorted(tensors))
    tensors[key], tensors[other] = tensors[other], tensors[key]


def add(tensors: Tensors, key: str, random: Random) -> None:
    tensors[
        random.choice(
            (f"{key}.more", "x", key.replace("lin", "lina"), key.replace("lin0", "lin7"), "base_model.x")
        )
    ] = tensors[key]


def add_of_base(tensors: Tensors, key: str, random: Random) -> None:
    name = random.choice(("lin0.base_layer.weight", "lin1.weight", "norm.bias", "lin0.weight", "emb.weight"))
    tensors[f"base_model.model.{name}"] = torch.randn(random.choice(((20, 12), (8, 20), (20,))))


def cast(tensors: Tensors, key: str, random: Random) -> None:
    tensors[key] = (tensors[key] * 3).to(random.choice(DTYPES))


def cast_all(tensors: Tensors, key: str, random: Random) -> None:
    dtype = random.choice(DTYPES[:3])
    for other, tensor in tensors.items():
        tensors[other] = tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def reshape(tensors: Tensors, key: str, random: Random) -> None:
    tensor = tensors[key]
    shapes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.T if tensor.dim() == 2 else tensor.flatten(),
        tensor.flatten,
        lambda: tensor.unsqueeze(0),
        lambda: tensor[:1],
        lambda: tensor[:0],
        lambda: tensor[..., :-1],
        lambda: torch.cat([tensor, tensor]),
    ]
    tensors[key] = random.choice(shapes)()


def poison(tensors: Tensors, key: str, random: Random) -> None:
    tensor = tensors[key].clone()
    if tensor.dtype.is_floating_point and tensor.numel():
        tensor.view(-1)[random.randrange(tensor.numel())] = random.choice((float("nan"), float("inf"), 1e30))
    tensors[key] = tensor


def perturb(tensors: Tensors, key: str, random: Random) -> None:
    tensors[key] = tensors[key] * 2


TENSOR_CHANGES = (
    *(
        drop,
        drop_most,
        rename,
        rename,
        lengthen_all,
        exchange,
        add,
        add,
        add_of_base,
        cast,
        cast_all,
        reshape,
    ),
    *(reshape, poison, perturb),
)


def _bytes(directory: Path, random: Random) -> str:
    path = directory / random.choice((TENSORS, TENSORS, CONFIG))
    data = bytearray(path.read_bytes())
    kind = random.choice(("flip", "flip in the header", "cut", "append", "repeat", "zero"))
    at = random.randrange(min(len(data), 400) if kind == "flip in the header" else len(data))
    if kind.startswith("flip"):
        data[at] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "append":
        data += random.randbytes(7)
    elif kind == "repeat":
        data[at:at] = data[at : at + 9]
    else:
        data[at : at + 5] = bytes(5)
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"
