"""Calibration data: rows of inputs that methods and schemes choose by, read and checked against the model's inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from adaptc.compiler.fisher import FisherInformation
from adaptc.errors import InputError, WeightError
from adaptc.inputs import IGNORED, InputSpec
from adaptc.ir.counted import counted_by, with_counted
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch
from adaptc.spec.entries import MethodEntry
from adaptc.spec.spec import Spec, resolve_path
from adaptc.weights import read_safetensors


def calibrate(spec: Spec, graph: Graph, batches: Iterable[Batch] | None) -> None:
    """Give a graph its rows of data, and the Fisher information where a method chooses by it.

    Args:
        spec: names a file of rows, which is read if there are no `batches`.
        graph: the traced graph, whose `rows` and `information` are set.
        batches: batches of inputs, in place of the spec's file.

    Raises:
        SpecError: the data cannot be read or does not fit the model's inputs, or the model gives no loss.
    """
    try:
        if batches is None and spec.calibration is not None:
            batches = read_rows(resolve_path(spec, spec.calibration), graph.inputs)
        if batches is None:
            return
        graph.calibration_rows = checked_rows(batches, graph.inputs)
        if any(isinstance(entry, MethodEntry) and entry.build().calibrated for entry in spec.adapt):
            graph.fisher_information = FisherInformation(graph)
    except InputError as error:
        raise spec.error(("calibration",), error.message, *error.notes) from error


def checked_rows(batches: Iterable[Batch], inputs: Sequence[InputSpec]) -> list[Batch]:
    """The rows of some batches, each as a batch of one, in the dtypes of the inputs.

    Raises:
        InputError: there is no row, or one has other inputs than the model.
    """
    return [row for batch in checked_batches(batches, inputs) for row in _rows(batch, inputs)]


def checked_batches(batches: Iterable[Batch], inputs: Sequence[InputSpec]) -> list[Batch]:
    """Batches in the dtypes of the inputs.

    Raises:
        InputError: there is none, or one has other inputs than the model.
    """
    checked: list[Batch] = []
    first = 1
    for batch in batches:
        checked.append(_checked(batch, inputs, first))
        first += sum(1 for _ in _rows(checked[-1], inputs))
    if not checked:
        raise InputError("there is no row of data")
    return checked


def read_rows(path: Path, inputs: Sequence[InputSpec]) -> list[Batch]:
    """Batches from a file: tensors of all rows (.safetensors), or a JSON object a row (.jsonl).

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a .jsonl or a .safetensors file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return [{name: weight.load() for name, weight in read_safetensors(path).items()}]
        except WeightError as error:
            raise InputError(error.message, *error.notes) from error
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: expected a .jsonl or a .safetensors file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_row(path, number, line, inputs) for number, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str, inputs: Sequence[InputSpec]) -> Batch:
    """One line of a .jsonl file as a batch of one."""
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}:{number}: expected an object of inputs, got {type(value).__name__}")
    row = cast("dict[str, Any]", value)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in row.items():
        try:
            tensors[name] = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            names = ", ".join(str(spec.name) for spec in inputs)
            raise InputError(
                f"{path}:{number}: {name}: expected numbers and lists of them, got {json.dumps(value)[:40]}; "
                f"the inputs are {names}"
            ) from None
    batched = {spec.name for spec in inputs if _has_batch(spec)}
    return {name: value.unsqueeze(0) if name in batched else value for name, value in tensors.items()}


def _checked(batch: object, inputs: Sequence[InputSpec], first: int) -> dict[str, torch.Tensor]:
    """A user's batch in the dtypes of the inputs; `first` is the number of its first row, for errors."""
    expected = ", ".join(f"{spec.name}: {spec}" for spec in inputs)
    values = cast("Mapping[str, Any]", batch) if isinstance(batch, Mapping) else None
    if values is not None and all(isinstance(value, torch.Tensor) for value in values.values()):
        values = with_counted(counted_by(inputs), values)
    if values is None or set(values) != {spec.name for spec in inputs}:
        kind: type = type(cast("object", batch))
        names = kind.__name__ if values is None else ", ".join(sorted(map(str, values)))
        raise InputError(f"row {first} has {names or 'nothing'}, expected {expected}")
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for spec in inputs:
        value = values[spec.name]
        if not isinstance(value, torch.Tensor) or value.dim() != len(spec.dims):
            given = f"{value.dim()} dimensions" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"row {first}: {spec.name} has {given}, expected {spec}")
        for dim, size in zip(spec.dims, value.shape, strict=True):
            wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != wanted:
                message = f"{spec.name} has {size} along {dim}, where another input of the row has {wanted}"
                raise InputError(f"row {first}: {message}")
        _check_values(spec, value, first)
        tensors[spec.name] = value.to(getattr(torch, spec.dtype))
    return tensors


def _check_values(spec: InputSpec, value: torch.Tensor, first: int) -> None:
    """An input holds numbers, whole ones where the model takes integers, and indices that it has.

    Raises:
        InputError: it does not.
    """
    if not value.numel():
        raise InputError(f"row {first}: {spec.name} holds nothing")
    if spec.dtype.startswith("int") and value.is_floating_point():
        raise InputError(f"row {first}: {spec.name} holds {value.flatten()[0]:g}, expected whole numbers")
    if spec.high is not None:
        token = spec.placeholders[0] if spec.placeholders else IGNORED
        wrong = value[((value >= spec.high) & (value != token)) | ((value < 0) & (value != IGNORED))]
        if wrong.numel():
            message = f"{spec.name} holds {int(wrong.flatten()[0])}, but the model knows 0 to {spec.high - 1}"
            raise InputError(f"row {first}: {message}")


def _rows(batch: Batch, inputs: Sequence[InputSpec]) -> Iterator[Batch]:
    """The rows of a batch, each as a batch of one."""
    batched = [spec.name for spec in inputs if _has_batch(spec)]
    count = batch[batched[0]].shape[0] if batched else 1
    for row in range(count):
        yield {name: value[row : row + 1] if name in batched else value for name, value in batch.items()}


def _has_batch(spec: InputSpec) -> bool:
    """Whether an input's first dimension varies: its index counts the rows of a batch."""
    return bool(spec.dims) and isinstance(spec.dims[0], str)
