"""An ONNX program run piece by piece: memory holds the weights of a few operations, not the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptc.emit.onnx.runtime import as_array, open_session
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run

PIECE = 2**25
"""Bytes of weights a piece has at most, unless one operation has more."""


@dataclass(frozen=True)
class Partition:
    """A run of operations, with the values it takes from earlier ones and those that later ones need of it."""

    nodes: Sequence[Any]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass
class PartitionedProgram:
    """An ONNX file, its weights beside it, as the side of a proof.

    Attributes:
        path: the file.
        shown: what an error calls it.
    """

    path: Path
    shown: Path

    @cached_property
    def model(self) -> Any:
        """The program without the data that stands beside it."""
        import onnx

        return onnx.load(self.path, format="protobuf", load_external_data=False)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every weight."""
        import onnx

        kinds = onnx.helper.tensor_dtype_to_np_dtype
        return {
            t.name: int(np.prod(t.dims, dtype=np.int64)) * kinds(t.data_type).itemsize
            for t in self.model.graph.initializer
        }

    @cached_property
    def pieces(self) -> list[Partition]:
        """The program's operations, in order, cut where the weights of a piece would be too many."""
        runs: list[list[Any]] = [[]]
        held: set[str] = set()
        for node in self.model.graph.node:
            own = {name for name in _reads(node) if name in self.sizes}
            if runs[-1] and sum(self.sizes[name] for name in held | own) > PIECE and own - held:
                runs.append([])
                held = set()
            runs[-1].append(node)
            held |= own
        needed = {*self.outputs, *self.choices}
        found = []
        for run in reversed(runs):
            found.append(_piece(run, needed, self.sizes))
            needed |= {name for node in run for name in _reads(node)}
        return found[::-1]

    @cached_property
    def outputs(self) -> list[str]:
        """What the program gives."""
        return [value.name for value in self.model.graph.output]

    @cached_property
    def choices(self) -> list[str]:
        """Where the values that it chooses or sorts stand, operation by operation."""
        return [node.output[1] for node in self.model.graph.node if node.op_type == "TopK"]

    def on(self, batches: Batches) -> Run:
        """One run of every batch, piece after piece."""
        values, failed = self._sweep(list(batches.values()))
        outcomes: dict[str, Outcome] = {}
        choices: dict[str, list[torch.Tensor]] = {}
        for index, name in enumerate(batches):
            outcomes[name] = failed.get(index) or _tensors(values[index], self.outputs)
            choices[name] = [] if index in failed else _tensors(values[index], self.choices)
        coverage = f"whole, in {len(self.pieces)} pieces one after the other"
        return Run(batches, outcomes, tuple(self.outputs), (coverage,), choices)

    def _sweep(self, batches: Sequence[Batch]) -> tuple[list[dict[str, Any]], dict[int, Exception]]:
        values: list[dict[str, Any]] = [{k: as_array(v) for k, v in batch.items()} for batch in batches]
        failed: dict[int, Exception] = {}
        kept = {*self.outputs, *self.choices}
        for number, piece in enumerate(self.pieces):
            later = {name for after in self.pieces[number + 1 :] for name in after.takes} | kept
            left = [known for index, known in enumerate(values) if index not in failed]
            if not left:
                break
            session = self._session(piece, left[0])
            for index, known in enumerate(values):
                if index in failed:
                    continue
                try:
                    feeds = {value.name: known[value.name] for value in session.get_inputs()}
                    results = session.run(None, feeds)
                except Exception as error:
                    failed[index] = error
                    known.clear()
                    continue
                known.update(zip([value.name for value in session.get_outputs()], results, strict=True))
                for name in known.keys() - later:
                    del known[name]
            del session
        return values, failed

    def _session(self, piece: Partition, known: Mapping[str, Any]) -> Any:
        import onnx

        made = onnx.ModelProto()
        made.CopyFrom(self.frame)
        read = {name for node in piece.nodes for name in _reads(node)}
        made.graph.node.extend(piece.nodes)
        made.graph.initializer.extend(t for t in self.model.graph.initializer if t.name in read)
        for name in piece.takes:
            array = known[name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            made.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.gives)
        return open_session(made.SerializeToString(), shown=self.shown, beside=self.path.parent)

    @cached_property
    def frame(self) -> Any:
        """The program without its graph."""
        import onnx

        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        made.ClearField("graph")
        made.graph.name = self.model.graph.name
        return made


def _tensors(known: Mapping[str, Any], names: Sequence[str]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(known[name])) for name in names]


def _piece(nodes: Sequence[Any], needed: set[str], weights: Mapping[str, int]) -> Partition:
    given = [name for node in nodes for name in node.output if name]
    own = {*given, *weights}
    taken = dict.fromkeys(name for node in nodes for name in _reads(node) if name not in own)
    return Partition(nodes, tuple(taken), tuple(name for name in given if name in needed))


def _reads(node: Any) -> Iterator[str]:
    """The values that an operation reads, those of the graphs within it too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {name for n in graph.node for name in n.output} | {i.name for i in graph.input}
            yield from (name for n in graph.node for name in _reads(n) if name not in inner)
