"""The ONNX artifact: a graph written as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from adaptc.compiler.artifacts.onnx_file import ExactSession, OnnxFile, Session
from adaptc.compiler.artifacts.onnx_programs import programs, split
from adaptc.compiler.artifacts.provenance import describe_base
from adaptc.compiler.program import Program
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.cached import COUNTED, ENCODER, LONGEST, NEW_TOKENS, encoder_beside, read_signature
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import Wrote, export_onnx
from adaptc.emit.onnx.overridable import Dims
from adaptc.emit.onnx.rounding import rounds_activations
from adaptc.ir.analysis.longest_text import longest_text
from adaptc.ir.graph import Graph
from adaptc.rewriter.cache.inputs import new_tokens, token_ids
from adaptc.spec.emit import OnnxEmit


@dataclass(frozen=True)
class Destination:
    """Where an ONNX program is written.

    Attributes:
        path: the file to write, in a staging folder.
        final: where it will be put.
        wrote: called while a data file is written.
        beside: write the weights in a data file whatever their size is.
        encoder: where an encoder is written; see `encoder_beside` if it is None.
    """

    path: Path
    final: Path
    wrote: Wrote | None = None
    beside: bool = False
    encoder: Path | None = None


def write_onnx(
    program: Program,
    graph: Graph,
    entry: OnnxEmit,
    to: Destination,
    overridable: Dims | None = None,
    told: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write a graph of a program as an ONNX file, whose metadata says what it was made of.

    Args:
        program: the program.
        graph: the graph.
        entry: the spec's entry that asks for the file.
        to: where it is written.
        overridable: the sizes of the weights that a call may replace.
        told: metadata beside what every file has.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    evaluated = evaluate(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    parts, attentions = programs(evaluated, entry)
    encoder = (to.encoder or encoder_beside(to.path)) if len(parts) > 1 else None
    metadata = _metadata(program, entry, to.final, evaluated, parts[0], encoder)
    if attentions.get("gqa"):
        metadata[COUNTED] = "right"
    metadata |= told or {}
    exact, runtime = not entry.round_activations, entry.target_runtime
    files = [to.path] if encoder is None else [to.path, encoder]
    written, *others = [
        export_onnx(
            part,
            file,
            entry.opset,
            metadata,
            to.wrote,
            runtime,
            exact,
            to.beside,
            *split(evaluated, part, overridable or {}),
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
    signature = read_signature(to.path)
    outputs = evaluated.outputs if signature is None else tuple(signature.results)
    return OnnxFile(
        entry,
        to.path,
        to.final,
        outputs,
        weights,
        written.large,
        unrounded,
        signature,
        encoder,
        about,
        Session(to.path, to.final, exact),
        None if unrounded is None else ExactSession(unrounded.copy(), entry, to.path, overridable or {}),
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
