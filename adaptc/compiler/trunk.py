"""The frozen trunk of a model, computed once: its outputs on disk, and the rest of the model, which trains on."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (it has no types)
from torch import fx

from adaptc.checkpoints.module_adapters import tensors_of
from adaptc.compiler.program import Program
from adaptc.compiler.trainable import module_record
from adaptc.errors import AdaptcError, InputError, WeightError
from adaptc.ir.conversion import META
from adaptc.ir.counted import counted_by, with_counted
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.rewriter.trunk import Cut, cut_trunk
from adaptc.weights import Held, sha256_of_tensors

OF, DATA, CONTENT = "trunk", "batch", "content"
"""What a file of the cache says of itself: the SHA-256 of its trunk, of the batch that it is of, of its tensors."""


class Trunk:
    """The stored batches of a trunk, and the part of the model that trains from them.

    Iterating, or indexing, gives a batch as a dict: what `module` takes, and what of the given batch the model does not
    take, such as labels. Tensors are mapped from the files, so that an epoch needs memory for one batch.

    Attributes:
        module: the part that trains, under the names of the whole: its trained tensors are those of `Compiled.module`.
        directory: where the batches are.
    """

    def __init__(self, module: fx.GraphModule, directory: Path, files: list[Path]):
        self.module, self.directory, self._files = module, directory, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return _tensors(self._files[number])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return map(_tensors, self._files)


def make_trunk(program: Program, batches: Iterable[Mapping[str, torch.Tensor]], directory: Path) -> Trunk:
    """Compute the trunk of every batch that the cache does not hold yet.

    The trunk runs in evaluation mode: its dropout is off, since its outputs are the same for all epochs.

    Args:
        program: the compiled program.
        batches: the inputs of the model by name, in the same order each time; what it does not take is stored along.
        directory: the cache. What an interrupted run has stored there is kept.

    Raises:
        RefusedError: nothing trains, or the first layer does.
        InputError: a batch lacks an input.
        AdaptcError: the cache is of another trunk or of other data; says which.
    """
    module = program.module
    cut = cut_trunk(program.trainable_graph())
    shared = tensors_of(module)
    store = _Store(program, cut, directory, shared)
    files: list[Path] = []
    for batch in batches:
        files.append(store.file_of(len(files), batch))
    rest = bind(cut.rest, cut.rest.adapter_names, shared)
    rest.meta[META] = module_record(cut.rest, program.base_record)
    _pass_over(rest, store.passed_over)
    return Trunk(rest.train(module.training), directory, files)


def _pass_over(module: fx.GraphModule, names: set[str]) -> None:
    """Let calls of a module hand it what is stored beside its inputs."""

    def drop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name not in names}

    cast("Any", module).register_forward_pre_hook(drop, with_kwargs=True)


class _Store:
    """The cache of one trunk.

    Args:
        program: the compiled program.
        cut: its trunk and rest.
        directory: where the files are.
        shared: the tensors of the trainable module by name.

    Attributes:
        passed_over: what batches hold beside the model's inputs.
    """

    def __init__(self, program: Program, cut: Cut, directory: Path, shared: Mapping[str, torch.Tensor]):
        self.directory, self.passed_over = directory, set[str]()
        self._trunk = bind(cut.trunk, shared=shared).eval()
        self._gives = cut.trunk.outputs
        self._takes = [spec.name for spec in cut.trunk.inputs]
        self._read = {spec.name for spec in cut.rest.inputs} - set(self._gives)
        self._inputs = {spec.name for spec in program.base.inputs}
        self._counted = counted_by(program.base.inputs)
        self._key = _digest(program, cut.trunk)
        directory.mkdir(parents=True, exist_ok=True)

    def file_of(self, number: int, batch: Mapping[str, torch.Tensor]) -> Path:
        """The file of one batch: as it is stored, or computed now.

        Raises:
            InputError: the batch lacks an input.
            AdaptcError: the file is of another trunk, or of another batch.
        """
        tensors = self._checked(number, batch)
        path = self.directory / f"{number:06d}.safetensors"
        data = _sha256(tensors)
        if not self._holds(path, data):
            self._write(path, tensors, data)
        return path

    def _checked(self, number: int, batch: object) -> dict[str, torch.Tensor]:
        """The tensors of a batch, and the positions that the model counts itself."""
        if not isinstance(batch, Mapping):
            raise InputError(
                f"batch {number} is a {type(batch).__name__}: expected a dict of tensors by the names of the inputs"
            )
        given = dict(cast("Mapping[str, Any]", batch))
        no_tensor = next((name for name, value in given.items() if not isinstance(value, torch.Tensor)), None)
        if no_tensor is not None:
            kind = type(given[no_tensor]).__name__
            raise InputError(f"batch {number}: {no_tensor} is a {kind}, expected a tensor")
        tensors = with_counted(self._counted, given)
        lacking = [n for n in sorted({*self._takes, *self._read}) if n not in tensors]
        if lacking:
            raise InputError(f"batch {number} lacks {', '.join(lacking)}, which the model takes")
        self.passed_over |= tensors.keys() - self._inputs
        return tensors

    def _holds(self, path: Path, data: str) -> bool:
        """Whether a file holds the outputs for a batch. One that is broken is told, and written anew.

        Raises:
            AdaptcError: it holds those of another trunk, or of another batch.
        """
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType] (it has no types)
                said: dict[str, str] = cast("Any", file).metadata() or {}
            broken = (
                "its content has changed" if said and _sha256(_tensors(path)) != said.get(CONTENT) else ""
            )
        except (SafetensorError, OSError) as error:
            said, broken = {}, str(error)
        if not said and not broken:
            broken = "it says nothing of where it comes from"
        if broken:
            warnings.warn(f"{path}: broken, and computed again: {broken}", stacklevel=5)
            return False
        for key, expected, what in ((OF, self._key, "another trunk"), (DATA, data, "another batch")):
            if said.get(key) != expected:
                raise AdaptcError(
                    f"{path}: the cache is of {what}: {str(said.get(key))[:12]}, here it is {expected[:12]}",
                    "name another directory, or delete this one; batches come in the same order each time",
                )
        return True

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], data: str) -> None:
        """Compute the trunk of a batch, and store it with what the rest reads itself: all of it, or nothing."""
        device = next((t.device for t in self._trunk.parameters()), torch.device("cpu"))
        with torch.no_grad():
            values = self._trunk(*(tensors[name].to(device) for name in self._takes))
        stored = dict(zip(self._gives, values, strict=True))
        stored |= {n: t for n, t in tensors.items() if n in self._read or n not in self._inputs}
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in stored.items()}
        beside = path.with_suffix(".part")
        save_file(stored, beside, {OF: self._key, DATA: data, CONTENT: _sha256(stored)})
        os.replace(beside, path)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory.

    Raises:
        WeightError: it is gone, or broken.
    """
    try:
        with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType] (it has no types)
            opened = cast("Any", file)
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path}: {error}", "compute it again: call trunk with the same batches") from error


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names."""
    return sha256_of_tensors((name, Held(tensor)) for name, tensor in tensors.items())


def _digest(program: Program, trunk: Graph) -> str:
    """SHA-256 of a trunk: of its operations, the base's weights, the spec's quantization, and what is not the base's.

    The last are tensors of adapters that no gradient changes, such as VeRA's, and buffers, which training changes.
    """
    spec = program.spec.source.data
    bits = {tensor for leaf in trunk.quantized.values() for tensor in leaf.tensors.values()}
    names = {n for n in trunk.weights if n in program.graph.inserted or n in trunk.buffers} - bits
    others = sha256_of_tensors((name, trunk.weights[name]) for name in names)
    parts = [trunk.text(), program.base_sha256, others]
    parts += [repr(spec.get(key)) for key in ("quantize", "budget", "calibration", "seed")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
