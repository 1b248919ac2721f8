"""Weights that are loaded late: a graph holds names, shapes and dtypes, and each tensor is read when it is needed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adaptc.errors import WeightError


class Weight(ABC):
    """One tensor of a graph. Its shape and dtype are known at once; its data is read by `load`.

    Attributes:
        shape: the sizes of the tensor's dimensions.
        dtype: the element type of what `load` returns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def load(self) -> torch.Tensor:
        """The tensor, of `shape` and `dtype`. Callers must not change it in place."""

    def exact(self) -> torch.Tensor:
        """The tensor in the widest dtype available, which may be wider than `dtype`. Folding starts from it."""
        return self.load()

    @property
    def nbytes(self) -> int:
        """The size of the loaded tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Held(Weight):
    """A tensor in memory, such as a parameter of the user's module. Changes made to it later take effect."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tensor's dtype."""
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        """The tensor itself, detached from autograd."""
        return self.tensor.detach()


@dataclass(frozen=True, eq=False)
class Stored(Weight):
    """A tensor in a safetensors file, cast to `dtype` where the file holds another.

    Attributes:
        file: the safetensors file.
        key: the tensor's name in it.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Read this one tensor.

        Raises:
            WeightError: the file is missing, truncated, or no safetensors file.
        """
        # Not by safetensors' own handle: it maps the file, and mapped pages stay in resident memory.
        open_safetensors(self.file)
        stored, start = _byte_offsets(str(self.file), self.file.stat().st_mtime_ns)[self.key]
        return FileSlice(self.file, start, self.shape, stored).load().to(self.dtype)


@dataclass(frozen=True, eq=False)
class FileSlice(Weight):
    """A tensor as contiguous bytes of a file.

    Attributes:
        file: the file.
        start: the offset of its first byte.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Read this one tensor.

        Raises:
            WeightError: the file ends before it.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        buffer, read = data.numpy().data, 0
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while read < len(buffer) and (count := file.readinto(buffer[read:])):
                read += count
        if read < len(buffer):
            raise WeightError(f"{self.file}: cut short while it was read; copy or download it again")
        return data.view(self.dtype).reshape(self.shape)


@dataclass(eq=False)
class Deferred(Weight):
    """A tensor that a function computes each time it is loaded, such as a parameter's initial value.

    `put` replaces the function, for everyone who holds this weight.

    Attributes:
        make: computes the tensor, of `shape` and of any dtype; `load` casts it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """Compute the tensor and cast it to `dtype`."""
        return self.make().to("cpu", self.dtype)

    def exact(self) -> torch.Tensor:
        """Compute the tensor in the dtype that `make` gives, without rounding to `dtype`."""
        return self.make().cpu()

    def put(self, value: Callable[[], torch.Tensor]) -> None:
        """Replace the function that computes the tensor."""
        self.make = value


@lru_cache(maxsize=64)
def _open(path: str, _modified: int) -> Any:
    return safe_open(path, framework="pt")


def open_safetensors(path: Path) -> Any:
    """A handle of `safetensors.safe_open` on a file, kept open while the file is unchanged.

    Raises:
        WeightError: the file is missing, truncated, or no safetensors file.
    """
    try:
        return _open(str(path), path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise WeightError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated: copy or download it again"
        ) from None


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors that adaptc reads, by their codes in its header -> torch's."""


@lru_cache(maxsize=64)
def _byte_offsets(path: str, _modified: int) -> dict[str, tuple[torch.dtype, int]]:
    """Key -> the tensor's dtype and the offset of its first byte, from the header of a file that is whole."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: (SAFETENSORS_DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by their keys, none of them loaded.

    Raises:
        WeightError: the file is missing, truncated or no safetensors file, or adaptc does not read a tensor's dtype.
    """
    file = open_safetensors(path)
    tensors: dict[str, Stored] = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        header = file.get_slice(key)
        code = header.get_dtype()
        if code not in SAFETENSORS_DTYPES:
            raise WeightError(f"{path}: tensor {key!r} has dtype {code}, which adaptc does not read")
        tensors[key] = Stored(path, key, tuple(header.get_shape()), SAFETENSORS_DTYPES[code])
    return tensors


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of one file in hex; of several, SHA-256 of their digests joined in the order of the paths."""
    digests: list[bytes] = []
    for path in sorted(paths):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def sha256_of_tensors(weights: Iterable[tuple[str, Weight]]) -> str:
    """SHA-256 in hex over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        tensor = weight.load().detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def seeded(seed: int, name: str) -> torch.Generator:
    """A random generator for one parameter; it depends on the seed and the parameter's name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def initial(init: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A new tensor in float32, filled by a named initialisation.

    Args:
        init: `zeros`, `ones`, `normal` (standard deviation 0.02, as transformers initialises most models),
            `standard-normal`, or `kaiming-uniform` (as `torch.nn.Linear` initialises its weight).
        shape: its shape.
        generator: where random numbers come from.

    Raises:
        ValueError: there is no such initialisation.
    """
    tensor = torch.empty(shape)
    match init:
        case "zeros":
            return tensor.zero_()
        case "ones":
            return tensor.fill_(1.0)
        case "normal":
            return tensor.normal_(std=0.02, generator=generator)
        case "standard-normal":
            return tensor.normal_(generator=generator)
        case "kaiming-uniform":
            return torch.nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)
        case _:
            raise ValueError(f"unknown initialisation {init!r}")
