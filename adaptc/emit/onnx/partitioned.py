"""An ONNX program run part by part: memory holds the weights of a few operations, not those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from adaptc.emit.onnx.runtime import as_array, open_session
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run

PIECE = 2**25
"""The bytes of weights that a part has at most, unless one operation has more. Chosen as small against a model."""
CHOICES = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}
"""Operations that choose among values -> which of their outputs is the indices."""


@dataclass(frozen=True)
class Partition:
    """Consecutive operations of a program.

    Attributes:
        nodes: the operations.
        takes: the names of the values that they read from earlier parts or the inputs.
        gives: the names of their values that later parts or the outputs need.
    """

    nodes: Sequence[Any]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass
class PartitionedProgram:
    """An ONNX file whose weights are in a data file, as a runner for a proof.

    Attributes:
        path: the file.
        shown: the path that an error names.
        adapter: tensors in the place of weights that a call may replace, by name.
    """

    path: Path
    shown: Path
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @cached_property
    def model(self) -> Any:
        """The program without the content of its data file."""
        loader: Any = onnx
        return loader.load(self.path, format="protobuf", load_external_data=False)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Weight -> its bytes; without those that the adapter replaces."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype
        return {
            t.name: int(np.prod(t.dims, dtype=np.int64)) * dtype(t.data_type).itemsize
            for t in self.model.graph.initializer
            if t.name not in self.adapter
        }

    @cached_property
    def pieces(self) -> list[Partition]:
        """The program's operations in order, cut where the weights of a part would be too many."""
        runs: list[list[Any]] = [[]]
        held: set[str] = set()
        for node in self.model.graph.node:
            read = {name for name in _reads(node) if name in self.sizes}
            if runs[-1] and sum(self.sizes[name] for name in held | read) > PIECE and read - held:
                runs.append([])
                held = set()
            runs[-1].append(node)
            held |= read
        needed = {*self.outputs, *self.choices}
        backwards: list[Partition] = []
        for run in reversed(runs):
            backwards.append(_partition(run, needed, self.sizes))
            needed |= {name for node in run for name in _reads(node)}
        return backwards[::-1]

    @cached_property
    def outputs(self) -> list[str]:
        """The names of the program's outputs."""
        return [value.name for value in self.model.graph.output]

    @cached_property
    def choices(self) -> list[str]:
        """The names of the indices that operations choose or sort by, in order."""
        nodes = self.model.graph.node
        return [node.output[CHOICES[node.op_type]] for node in nodes if node.op_type in CHOICES]

    def on(self, batches: Batches) -> Run:
        """One run of every batch, part after part."""
        values, failed = self._sweep(list(batches.values()))
        outcomes: dict[str, Outcome] = {}
        choices: dict[str, list[torch.Tensor]] = {}
        for index, name in enumerate(batches):
            outcomes[name] = failed.get(index) or _tensors(values[index], self.outputs)
            choices[name] = [] if index in failed else _tensors(values[index], self.choices)
        coverage = f"whole, in {len(self.pieces)} pieces one after the other"
        return Run(batches, outcomes, tuple(self.outputs), coverage, (), choices)

    def _sweep(self, batches: Sequence[Batch]) -> tuple[list[dict[str, Any]], dict[int, Exception]]:
        """Run each part on all batches before the next one.

        Returns:
            For each batch its outputs and choices by name, and the number of each batch that failed -> the error.
        """
        values: list[dict[str, Any]] = [
            {k: as_array(v) for k, v in {**batch, **self.adapter}.items()} for batch in batches
        ]
        failed: dict[int, Exception] = {}
        results = {*self.outputs, *self.choices}
        for number, partition in enumerate(self.pieces):
            needed = {name for later in self.pieces[number + 1 :] for name in later.takes} | results
            running = [arrays for index, arrays in enumerate(values) if index not in failed]
            if not running:
                break
            session = self._session(partition, running[0])
            for index, arrays in enumerate(values):
                if index in failed:
                    continue
                try:
                    feeds = {value.name: arrays[value.name] for value in session.get_inputs()}
                    outputs = session.run(None, feeds)
                except Exception as error:
                    failed[index] = error
                    arrays.clear()
                    continue
                arrays.update(zip([value.name for value in session.get_outputs()], outputs, strict=True))
                for name in arrays.keys() - needed:
                    del arrays[name]
            del session
        return values, failed

    def _session(self, partition: Partition, arrays: Mapping[str, Any]) -> Any:
        """A session of one part, whose inputs have the dtypes and ranks of these arrays."""
        model: Any = onnx.ModelProto()
        model.CopyFrom(self.frame)
        read = {name for node in partition.nodes for name in _reads(node)}
        model.graph.node.extend(partition.nodes)
        model.graph.initializer.extend(
            t for t in self.model.graph.initializer if t.name in read & self.sizes.keys()
        )
        for name in partition.takes:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(arrays[name].dtype)
            sizes = [None] * arrays[name].ndim
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, sizes))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in partition.gives)
        return open_session(model.SerializeToString(), shown=self.shown, beside=self.path.parent)

    @cached_property
    def frame(self) -> Any:
        """The program without its operations and weights."""
        frame: Any = onnx.ModelProto()
        frame.CopyFrom(self.model)
        frame.ClearField("graph")
        frame.graph.name = self.model.graph.name
        return frame


def _tensors(arrays: Mapping[str, object], names: Sequence[str]) -> list[torch.Tensor]:
    """Some of the arrays as tensors."""
    return [torch.as_tensor(np.asarray(arrays[name])) for name in names]


def _partition(nodes: Sequence[Any], needed: set[str], weights: Mapping[str, int]) -> Partition:
    """Operations as a part of a program, with its weights and the names that the rest of it needs."""
    outputs = [name for node in nodes for name in node.output if name]
    inner = {*outputs, *weights}
    taken = dict.fromkeys(name for node in nodes for name in _reads(node) if name not in inner)
    return Partition(nodes, tuple(taken), tuple(name for name in outputs if name in needed))


def _reads(node: Any) -> Iterator[str]:
    """The names of the values that an operation reads, and that the graphs inside it read from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {name for n in graph.node for name in n.output} | {i.name for i in graph.input}
            yield from (name for n in graph.node for name in _reads(n) if name not in inner)
