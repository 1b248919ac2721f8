"""Calibration: data that methods choose by, and the Fisher information that it gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import InputError
from adaptc.inputs import IGNORED, InputSpec
from adaptc.weights import read_safetensors

if TYPE_CHECKING:
    from adaptc.ir.graph import Graph

Batch = Mapping[str, torch.Tensor]


class Information:
    """The empirical Fisher information of weights: the mean over rows of (∂ loss / ∂ w)², in float32.

    Args:
        graph: a traced graph that gives a loss, with rows of inputs and labels; every row counts by itself.

    Raises:
        InputError: the graph gives no loss.
    """

    def __init__(self, graph: Graph):
        self.graph, self.loss = graph, _loss(graph)
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """Of one weight, in its shape."""
        return self.of([name])[name]

    def of(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Of several weights, by one run over the data."""
        wanted = list(names)
        missing = [name for name in wanted if name not in self._known]
        if missing:
            self._known |= self._estimate(missing)
        return {name: self._known[name] for name in wanted}

    def _estimate(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        from adaptc.ir.module import bind

        module = bind(self.graph, names).eval()
        parameters = {name: module.get_parameter(name) for name in names}
        sums = {name: torch.zeros(p.shape) for name, p in parameters.items()}
        for number, row in enumerate(self.graph.calibration_rows, 1):
            module.zero_grad()
            try:
                leaves = [
                    leaf for leaf in pytree.tree_leaves(module(**row)) if isinstance(leaf, torch.Tensor)
                ]
            except (RuntimeError, IndexError, ValueError) as error:
                raise InputError(f"calibration: the model does not take row {number}: {error}") from error
            leaves[self.loss].backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    sums[name] += p.grad.float().square()
        return {name: total / len(self.graph.calibration_rows) for name, total in sums.items()}


def checked_rows(batches: Iterable[Batch], inputs: Sequence[InputSpec]) -> list[Batch]:
    """The rows of some batches, each as a batch of one, in the dtypes of the inputs.

    Raises:
        InputError: there is no row, or one has other inputs than the model.
    """
    rows: list[Batch] = []
    for batch in batches:
        rows += _rows(_checked(batch, inputs, len(rows) + 1), inputs)
    if not rows:
        raise InputError("there is no row of data")
    return rows


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
        return [{name: weight.load() for name, weight in read_safetensors(path).items()}]
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: expected a .jsonl or a .safetensors file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_row(path, number, line, inputs) for number, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str, inputs: Sequence[InputSpec]) -> Batch:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: expected an object of inputs, got {type(row).__name__}")
    tensors = {}
    for name, value in row.items():
        try:
            tensors[name] = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            known = ", ".join(str(spec.name) for spec in inputs)
            raise InputError(
                f"{path}:{number}: {name}: expected numbers and lists of them, got {json.dumps(value)[:40]}; "
                f"the inputs are {known}"
            ) from None
    batched = {spec.name for spec in inputs if _batch_of(spec) is not None}
    return {name: value.unsqueeze(0) if name in batched else value for name, value in tensors.items()}


def _checked(batch: Batch, inputs: Sequence[InputSpec], first: int) -> Batch:
    """A batch in the dtypes of the inputs; `first` is the number of its first row, for errors."""
    names = ", ".join(f"{spec.name}: {spec}" for spec in inputs)
    if not isinstance(batch, Mapping) or set(batch) != {spec.name for spec in inputs}:
        held = ", ".join(sorted(map(str, batch))) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(f"row {first} has {held or 'nothing'}, expected {names}")
    found, sizes = {}, {}
    for spec in inputs:
        value = batch[spec.name]
        if not isinstance(value, torch.Tensor) or value.dim() != len(spec.dims):
            got = f"{value.dim()} dimensions" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"row {first}: {spec.name} has {got}, expected {spec}")
        for dim, size in zip(spec.dims, value.shape, strict=True):
            known = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != known:
                words = f"{size} along {dim}, where another input of the row has {known}"
                raise InputError(f"row {first}: {spec.name} has {words}")
        if not value.numel():
            raise InputError(f"row {first}: {spec.name} holds nothing")
        if spec.dtype.startswith("int") and value.is_floating_point():
            raise InputError(f"row {first}: {spec.name} holds {value.flatten()[0]:g}, expected whole numbers")
        if spec.high is not None:
            wrong = value[(value >= spec.high) | ((value < 0) & (value != IGNORED))]
            if wrong.numel():
                words = f"holds {int(wrong.flatten()[0])}, but the model knows 0 to {spec.high - 1}"
                raise InputError(f"row {first}: {spec.name} {words}")
        found[spec.name] = value.to(getattr(torch, spec.dtype))
    return found


def _rows(batch: Batch, inputs: Sequence[InputSpec]) -> Iterator[Batch]:
    """The rows of a batch, each as a batch of one."""
    batched = [spec.name for spec in inputs if _batch_of(spec) is not None]
    count = batch[batched[0]].shape[0] if batched else 1
    for row in range(count):
        yield {name: value[row : row + 1] if name in batched else value for name, value in batch.items()}


def _batch_of(spec: InputSpec) -> Any:
    """The name of the first dimension, where it is dynamic."""
    return spec.dims[0] if spec.dims and isinstance(spec.dims[0], str) else None


def _loss(graph: Graph) -> int:
    """Which of the outputs is the loss.

    Raises:
        InputError: none is a single number, or several are and none is called loss.
    """
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    values = [node.meta["val"] for node in pytree.tree_leaves(result) if hasattr(node, "meta")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    single = [i for i, value in enumerate(tensors) if value.dim() == 0 and value.dtype.is_floating_point]
    named = [i for i, name in enumerate(graph.tensor_outputs) if name == "loss"]
    found = named or single
    if len(found) != 1:
        raise InputError(
            "calibration needs a loss, and the model gives none: put its labels among `inputs`, "
            "such as labels: int64[batch]"
        )
    return found[0]
