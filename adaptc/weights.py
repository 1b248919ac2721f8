"""Weights, bound late: a graph holds names, shapes and dtypes; each tensor is loaded when somebody asks."""

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
    """One tensor of a graph: shape and dtype now, data when `load` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def load(self) -> torch.Tensor:
        """The data, of `shape` and `dtype`; not to be changed in place."""

    def exact(self) -> torch.Tensor:
        """The data as wide as it is known: what folding starts from."""
        return self.load()

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes when loaded."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Held(Weight):
    """A tensor in memory, such as a parameter of the user's module; later changes to it are seen."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The tensor's dtype."""
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        """The tensor itself, without its autograd history."""
        return self.tensor.detach()


@dataclass(frozen=True, eq=False)
class Stored(Weight):
    """A tensor in a safetensors file, read when asked for; cast to `dtype` where the file holds another."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Read this one tensor."""
        # Not by safetensors' own handle: it maps the file, and mapped pages stay in resident memory.
        open_safetensors(self.file)
        stored, start = _places(str(self.file), self.file.stat().st_mtime_ns)[self.key]
        return FileSlice(self.file, start, self.shape, stored).load().to(self.dtype)


@dataclass(frozen=True, eq=False)
class FileSlice(Weight):
    """A tensor whose bytes stand in a file from `start` on."""

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
        whole, read = data.numpy().data, 0
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while read < len(whole) and (count := file.readinto(whole[read:])):
                read += count
        if read < len(whole):
            raise WeightError(f"{self.file}: cut short while it was read; copy or download it again")
        return data.view(self.dtype).reshape(self.shape)


@dataclass(eq=False)
class Deferred(Weight):
    """A tensor made on request, such as an initial value, until another one is put in its place.

    Everyone who holds it sees the new value, in `shape` and `dtype`, or by `exact` as wide as it was given.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """Compute it."""
        return self.make().to("cpu", self.dtype)

    def exact(self) -> torch.Tensor:
        """Compute it, without rounding to `dtype`."""
        return self.make().cpu()

    def put(self, value: Callable[[], torch.Tensor]) -> None:
        """Take another value from now on."""
        self.make = value


@lru_cache(maxsize=64)
def _open(path: str, _modified: int) -> Any:
    return safe_open(path, framework="pt")


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file.

    Raises:
        WeightError: the file is missing, truncated, or something else.
    """
    try:
        return _open(str(path), path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise WeightError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated: copy or download it again"
        ) from None


DTYPES = {
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


@lru_cache(maxsize=64)
def _places(path: str, _modified: int) -> dict[str, tuple[torch.dtype, int]]:
    """Key -> dtype and first byte, from the header of a file that is known to be whole."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: (DTYPES[about["dtype"]], 8 + length + about["data_offsets"][0])
        for key, about in header.items()
        if key != "__metadata__"
    }


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, none of them loaded."""
    file = open_safetensors(path)
    found = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        piece = file.get_slice(key)
        if piece.get_dtype() not in DTYPES:
            raise WeightError(
                f"{path}: tensor {key!r} has dtype {piece.get_dtype()}, which adaptc does not read"
            )
        found[key] = Stored(path, key, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
    return found


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of a file; of several, SHA-256 over theirs, in the order of their names."""
    digests = []
    for path in sorted(paths):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def sha256_of_tensors(weights: Iterable[tuple[str, Weight]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        tensor = weight.load().detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and the parameter's name, not on the order of initialisation."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def initial(init: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A named initialisation, in float32."""
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
    raise ValueError(f"unknown initialisation {init!r}")
