"""Safetensors files, written one tensor at a time and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from adaptc.errors import ProofError, WeightError
from adaptc.weights import SAFETENSORS_DTYPES, Stored, Weight

NAMES = "model{suffix}.safetensors"
"""What transformers calls the files; the suffix is empty for one, or `-00001-of-00003`."""
INDEX = "model.safetensors.index.json"
CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


def write_shards(
    directory: Path, weights: Mapping[str, Weight], max_shard_size: str, parameters: int
) -> dict[str, Stored]:
    """Write weights as `model.safetensors`, or as several files and their index, and read every tensor back.

    Gives the weights as they stand in the files.

    The files are planned from shapes and dtypes; one tensor is in memory at a time.

    Args:
        directory: where to.
        weights: in the order in which they are written.
        max_shard_size: of one file, such as "5GB"; a tensor that is larger has a file of its own.
        parameters: their number, which the index states.

    Raises:
        WeightError: a dtype that is not written, or a weight that is not what it says it is.
        ProofError: a tensor is not read back as it was written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda weight: weight.nbytes,
        filename_pattern=NAMES,
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        digests = write_safetensors(directory / file, {name: weights[name] for name in names})
        check_safetensors(directory / file, digests)
    if plan.is_sharded:
        metadata = {"total_parameters": parameters, **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    files = plan.tensor_to_filename
    return {name: Stored(directory / files[name], name, w.shape, w.dtype) for name, w in weights.items()}


def write_safetensors(path: Path, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Write one file: the header's length in 8 bytes, the header as JSON, the data. Gives each tensor's digest.

    Raises:
        WeightError: a dtype that is not written, or a weight that is not what it says it is.
    """
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)  # each is then aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        weight = weights[name]
        if weight.dtype not in CODES:
            raise WeightError(f"{name} is {weight.dtype}; expected one of {', '.join(map(str, CODES))}")
        start, end = end, end + weight.nbytes
        shape = list(weight.shape)
        header[name] = {"dtype": CODES[weight.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        return {name: _write(file, name, weights[name]) for name in names}


def check_safetensors(path: Path, digests: Mapping[str, str]) -> None:
    """Read a file with safetensors itself, and hold every tensor against the digest of what was written.

    Raises:
        ProofError: a tensor is missing, or differs in a bit.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            if set(file.keys()) != set(digests):
                raise ProofError(f"{path.name} does not hold the tensors that were written to it")
            for name, written in digests.items():
                if _digest(file.get_tensor(name)) != written:
                    raise ProofError(f"{name} was not read back as it was written to {path.name}")
    except SafetensorError as error:
        raise ProofError(f"{path.name} is not a whole safetensors file: {error}") from None


def _write(file: IO[bytes], name: str, weight: Weight) -> str:
    tensor = weight.load()
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        raise WeightError(
            f"{name} is {weight.dtype} {list(weight.shape)}, but was loaded as "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    file.write(_bytes(tensor))
    return _digest(tensor)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()
