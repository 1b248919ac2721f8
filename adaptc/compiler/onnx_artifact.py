"""The ONNX artifact: a graph written as an ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from adaptc.compiler.cached_runner import CachedRunner, EncoderRunner, in_calls
from adaptc.compiler.program import Program
from adaptc.compiler.provenance import describe_base
from adaptc.compiler.runners import BatchRunner, Runner
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.adapter_file import read_adapter
from adaptc.emit.onnx.attention_forms import with_attention
from adaptc.emit.onnx.cached import (
    COUNTED,
    ENCODER,
    LONGEST,
    NEW_TOKENS,
    encoder_beside,
    read_outputs,
    read_signature,
)
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import Wrote, data_file_of, export_onnx
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.norms import NormsOfSums, RootMeanSquareNorms
from adaptc.emit.onnx.overridable import Dims
from adaptc.emit.onnx.partitioned import PartitionedProgram
from adaptc.emit.onnx.rounding import rounds_activations
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.emit.staging import Staging
from adaptc.ir.analysis.longest_text import longest_text
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Run
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder, Encoder, crossed
from adaptc.rewriter.cache.first_past import Behind, WithoutVirtualTokens, first_past
from adaptc.rewriter.cache.inputs import new_tokens, token_ids
from adaptc.rewriter.cache.signature import CacheSignature
from adaptc.rewriter.pipeline import Pass, run
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
            overridable, unread = _split(self.graph, graph, self.overridable)
            options: Any = {
                "runtime": self.entry.target_runtime,
                "overridable": overridable,
                "unread": unread,
            }
            export_onnx(graph, exact, self.entry.opset, exact=True, **options)
            return open_session(exact, shown=self.path, exact=True)


def write_onnx(
    program: Program,
    graph: Graph,
    entry: OnnxEmit,
    path: Path,
    final: Path,
    wrote: Wrote | None = None,
    beside: bool = False,
    encoder_path: Path | None = None,
    overridable: Dims | None = None,
    told: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write a graph of a program as an ONNX file, whose metadata says what it was made of.

    Args:
        program: the program.
        graph: the graph.
        entry: the spec's entry that asks for the file.
        path: where it is written.
        final: where it will be put.
        wrote: called while a data file is written.
        beside: write the weights in a data file whatever their size is.
        encoder_path: where an encoder is written; see `encoder_beside` if it is None.
        overridable: the sizes of the weights that a call may replace.
        told: metadata beside what every file has.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    evaluated = evaluate(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    parts, attentions = programs(evaluated, entry)
    encoder = (encoder_path or encoder_beside(path)) if len(parts) > 1 else None
    metadata = _metadata(program, entry, final, evaluated, parts[0], encoder)
    if attentions.get("gqa"):
        metadata[COUNTED] = "right"
    metadata |= told or {}
    exact, runtime = not entry.round_activations, entry.target_runtime
    files = [path] if encoder is None else [path, encoder]
    written, *others = [
        export_onnx(
            part,
            file,
            entry.opset,
            metadata,
            wrote,
            runtime,
            exact,
            beside,
            *_split(evaluated, part, overridable or {}),
        )
        for part, file in zip(parts, files, strict=True)
    ]
    weights = {name: weight for each in (*others, written) for name, weight in each.weights.items()}
    about: dict[str, Any] = {
        "nodes": written.nodes,
        "opset": written.opset,
        "inputs": {
            spec.name: str(spec).replace("bfloat16", "float32")
            for spec in parts[0].inputs
            if spec.name not in (overridable or {})
        },
        "outputs": list(parts[0].outputs),
    }
    if attentions:
        about["attention"] = attentions
    signature = read_signature(path)
    outputs = evaluated.outputs if signature is None else tuple(signature.results)
    return OnnxFile(
        entry,
        path,
        final,
        outputs,
        weights,
        written.large,
        unrounded,
        signature,
        encoder,
        about,
        Session(path, final, exact),
        None if unrounded is None else ExactSession(unrounded.copy(), entry, path, overridable or {}),
        f"onnx, {entry.adapters}",
    )


def _metadata(
    program: Program, entry: OnnxEmit, final: Path, whole: Graph, part: Graph, encoder: Path | None
) -> dict[str, str]:
    """What a program says of itself.

    Args:
        program: what it was compiled as.
        entry: the spec's entry.
        final: where it will be put.
        whole: its graph without a cache.
        part: its graph.
        encoder: the file of the encoder beside it.
    """
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": describe_base(program, final.parent),
        "adaptc.base_sha256": program.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in program.plan.entries),
    }
    if encoder is not None:
        metadata[ENCODER] = encoder.name
    if entry.cache:
        metadata[NEW_TOKENS], ids = new_tokens(part), token_ids(whole)
        limit = longest_text(whole.nodes, ids) if isinstance(ids, fx.Node) else None
        metadata |= {LONGEST: str(limit.tokens)} if limit is not None else {}
    return metadata


def _split(whole: Graph, part: Graph, overridable: Dims) -> tuple[Dims, dict[str, tuple[int, torch.dtype]]]:
    """Of the weights that a call may replace, those that a program reads, and those that only one beside it does.

    Args:
        whole: the graph of both.
        part: the program's own.
        overridable: the sizes of all of them.
    """
    names = {str(node.target) for node in part.nodes if node.op == "get_attr"}
    names |= {spec.name for spec in part.inputs}
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in whole.inputs}
    read = {name: sizes for name, sizes in overridable.items() if name in names}
    unread = {
        name: (len(sizes), dtypes[name] if name in dtypes else whole.weights[name].dtype)
        for name, sizes in overridable.items()
        if name not in names
    }
    return read, unread


def programs(graph: Graph, entry: OnnxEmit) -> tuple[list[Graph], dict[str, Any]]:
    """The graphs of an entry's programs: its own first, then that of an encoder, where a decoder with a cache has one.

    Args:
        graph: it only evaluates.
        entry: says whether there is a cache, and the form of attention.

    Returns:
        the graphs; and how many attentions of the first have which form, see `with_attention`.
    """
    if not entry.cache:
        graph, attentions = with_attention(graph, entry.attention_form, entry.opset)
        return [graph], attentions
    first = first_past(graph)
    functional = run(graph, [WithoutVirtualTokens(), Functional()])
    encoder = [run(functional, [Encoder()])] if crossed(functional) else []
    for_runtime = entry.target_runtime == "onnxruntime"
    norms: list[Pass] = [RootMeanSquareNorms(), NormsOfSums()] if for_runtime else []
    behind = [Behind(first)] if first else []
    decoder = run(functional, [Decoder(), Cache(), *behind, *norms])
    decoder, attentions = with_attention(decoder, entry.attention_form, entry.opset)
    return [decoder, *encoder], attentions
