"""An ONNX file of a compile, with the sessions that run it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.artifacts.onnx_programs import programs, split
from adaptc.compiler.proof.cached_runner import CachedRunner, EncoderRunner, in_calls
from adaptc.compiler.proof.runners import BatchRunner, Runner
from adaptc.emit.onnx.adapter_file import read_adapter
from adaptc.emit.onnx.cached import read_outputs
from adaptc.emit.onnx.export import data_file_of, export_onnx
from adaptc.emit.onnx.overridable import Dims
from adaptc.emit.onnx.partitioned import PartitionedProgram
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.emit.staging import Staging
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Run
from adaptc.rewriter.cache.signature import CacheSignature
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import Weight


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written to a staging folder.

    Attributes:
        entry: the spec's entry that asks for it.
        path: where the file is.
        final: where it will be put.
        outputs: the names of its outputs.
        weights: the weights in the data file, to be read back; empty where the program holds them itself.
        large: whether the weights are too many to be in memory at once for a proof.
        unrounded: the graph, where ONNX Runtime rounds activations of its matrix products; else None.
        signature: what the program takes and gives, where it has a cache; else None.
        encoder: the file of an encoder whose keys and values the program takes; None where there is none.
        about: what a manifest says of it: `nodes`, `opset`, `inputs`, `outputs`.
        session: of the file, where it holds its weights itself.
        exact: of a file of the same graph that does not round; None where this one does not.
        adapter: what replaces them in the runs of this object: tensors by name, or an `.onnx_adapter` file.
        name: what proofs call the file.
    """

    entry: OnnxEmit
    path: Path
    final: Path
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    large: bool
    unrounded: Graph | None
    signature: CacheSignature | None
    encoder: Path | None
    about: Mapping[str, Any]
    session: Session
    exact: ExactSession | None
    name: str
    adapter: Mapping[str, torch.Tensor] | Path = field(default_factory=dict[str, torch.Tensor])

    @property
    def partitioned(self) -> PartitionedProgram:
        """A runner of the file that holds the weights of a few operations at a time."""
        return PartitionedProgram(self.path, self.final, self._tensors)

    @property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors that replace weights."""
        return read_adapter(self.adapter) if isinstance(self.adapter, Path) else self.adapter

    @property
    def runner(self) -> Runner:
        """A runner of the file: in pieces where the weights are many."""
        return (
            self.partitioned if self.large else BatchRunner(session_call(self.session.opened, self.adapter))
        )

    @property
    def keeps_buffers(self) -> bool:
        """Whether it can keep all keys and values in one buffer, and is run as it stands."""
        return self.has_one_buffer and not self.large and self.encoder is None and not self.adapter

    @property
    def has_one_buffer(self) -> bool:
        """Whether the program can keep keys and values in a buffer with room for all: each attention is a `gqa`."""
        counts = dict(self.about.get("attention", {}))
        return bool(counts.get("gqa")) and not any(counts.get(form) for form in ("standard", "plain"))

    @property
    def unrounded_runner(self) -> Runner:
        """A runner of a file of the same graph that does not round activations."""
        assert self.exact is not None
        return BatchRunner(session_call(self.exact.opened, self._tensors))

    @property
    def encoder_runner(self) -> EncoderRunner | None:
        """A runner of the encoder's file."""
        if self.encoder is None:
            return None
        large = PartitionedProgram(self.encoder, self.encoder, self._tensors)
        small = Session(self.encoder, self.encoder, not self.entry.round_activations)
        runner = large if self.large else BatchRunner(session_call(small.opened, self.adapter))
        return EncoderRunner(runner, read_outputs(self.encoder))

    @property
    def unrounded_encoder(self) -> EncoderRunner | None:
        """A runner of a file of the encoder that does not round activations."""
        if self.encoder is None:
            return None
        assert self.exact is not None
        runner = BatchRunner(session_call(self.exact.encoder, self._tensors))
        return EncoderRunner(runner, read_outputs(self.encoder))

    def on(self, batches: Batches) -> Run:
        """One run of every batch, in several calls where there is a cache."""
        if self.signature is None:
            return self.runner.on(batches)
        calls = in_calls(self.signature)
        return CachedRunner(self.runner, self.signature, calls, self.encoder_runner).on(batches)

    def staged(self, staging: Staging) -> list[Path]:
        """The program; its data file, its encoder and that one's data file are moved to staged paths of their own."""
        beside = [data_file_of(self.path)]
        if self.encoder is not None:
            beside += [self.encoder, data_file_of(self.encoder)]
        moved = [
            file.replace(staging.path(self.final.with_name(file.name))) for file in beside if file.exists()
        ]
        return [self.path, *moved]


@dataclass
class Session:
    """A session of an ONNX file that is opened when it is first needed, and then again used.

    Attributes:
        path: the file.
        shown: the path that an error names.
        exact: do not round activations.
    """

    path: Path
    shown: Path
    exact: bool

    @cached_property
    def opened(self) -> Any:
        """The session."""
        return open_session(self.path, shown=self.shown, exact=self.exact)


@dataclass
class ExactSession:
    """A session of a file that is written when it is first needed: of the same graph, and it does not round.

    Attributes:
        graph: the graph.
        entry: the spec's entry that asks for the file that rounds.
        path: that file.
        overridable: the sizes of the weights that a call may replace.
    """

    graph: Graph
    entry: OnnxEmit
    path: Path
    overridable: Dims

    @cached_property
    def opened(self) -> Any:
        """The session."""
        return self._written(0)

    @cached_property
    def encoder(self) -> Any:
        """The session of the encoder."""
        return self._written(1)

    def _written(self, number: int) -> Any:
        """A session of one of the entry's programs."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            exact, graph = Path(folder) / self.path.name, programs(self.graph.copy(), self.entry)[0][number]
            overridable, unread = split(self.graph, graph, self.overridable)
            options: Any = {
                "runtime": self.entry.target_runtime,
                "overridable": overridable,
                "unread": unread,
            }
            export_onnx(graph, exact, self.entry.opset, exact=True, **options)
            return open_session(exact, shown=self.path, exact=True)
