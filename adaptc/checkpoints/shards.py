"""Write safetensors files, one tensor at a time, and check them by reading every tensor back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from adaptc.errors import ProofError, WeightError
from adaptc.optional import optional
from adaptc.weights import SAFETENSORS_DTYPES, Stored, Weight

NAMES = "model{suffix}.safetensors"
"""The file names of transformers; the suffix is empty for a single file, else such as `-00001-of-00003`."""
INDEX = "model.safetensors.index.json"
"""The file that names the shard of every tensor."""
CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
"""dtype -> its code in the header of a safetensors file."""


def write_shards(
    directory: Path, weights: Mapping[str, Weight], max_shard_size: str, parameters: int
) -> dict[str, Stored]:
    """Write weights as `model.safetensors`, or as several files and their index, and read every tensor back.

    The files are planned from shapes and dtypes; one tensor is in memory at a time.

    Args:
        directory: the directory; it must exist.
        weights: the weights by name, in the order in which they are distributed over files.
        max_shard_size: the largest size of one file, such as "5GB"; a larger tensor has a file of its own.
        parameters: the number of parameters, which the index states.

    Returns:
        Name -> the weight as it is stored in its file.

    Raises:
        WeightError: safetensors has no code for a dtype, or a loaded tensor has another shape or dtype than stated.
        ProofError: a tensor is not read back as it was written.
    """
    plan = optional("huggingface_hub").split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=_nbytes,
        filename_pattern=NAMES,
        max_shard_size=max_shard_size,
    )
    files: dict[str, str] = plan.tensor_to_filename
    for file, names in plan.filename_to_tensors.items():
        digests = write_safetensors(directory / file, {name: weights[name] for name in names})
        check_safetensors(directory / file, digests)
    if plan.is_sharded:
        metadata = {"total_parameters": parameters, **plan.metadata}
        index = {"metadata": metadata, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {name: Stored(directory / files[name], name, w.shape, w.dtype) for name, w in weights.items()}


def write_safetensors(path: Path, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Write one file: the header's length in 8 bytes, the header as JSON, the data.

    Returns:
        Name -> the digest of the tensor written.

    Raises:
        WeightError: safetensors has no code for a dtype, or a loaded tensor has another shape or dtype than stated.
    """
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)  # so every tensor is aligned
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
    """Read a file with safetensors itself, and compare the digest of every tensor with the one written.

    Args:
        path: the file.
        digests: name -> the digest that `write_safetensors` returned.

    Raises:
        ProofError: the file is broken, or a tensor is missing or differs.
    """
    try:
        with cast(Any, safe_open)(path, framework="pt", backend="pread") as file:
            if set(file.keys()) != set(digests):
                raise ProofError(f"{path.name} does not hold the tensors that were written to it")
            for name, written in digests.items():
                if _digest(file.get_tensor(name)) != written:
                    raise ProofError(f"{name} was not read back as it was written to {path.name}")
    except SafetensorError as error:
        raise ProofError(f"{path.name} is not a whole safetensors file: {error}") from None


def _nbytes(weight: Weight) -> int:
    return weight.nbytes


def _write(file: IO[bytes], name: str, weight: Weight) -> str:
    """Write one tensor and give its digest."""
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
    """SHA-256 over dtype, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()
