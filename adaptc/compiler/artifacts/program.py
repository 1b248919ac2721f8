"""An ONNX program of a compile: folded or live, written, proved, and described for a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adaptc.compiler.artifacts.onnx import Destination, write_onnx
from adaptc.compiler.artifacts.onnx_file import OnnxFile
from adaptc.compiler.artifacts.onnx_proof import prove_onnx
from adaptc.compiler.folding import fold, prove_fold
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.proofs import check_finite
from adaptc.compiler.proof.quantization_error import QuantizationErrors
from adaptc.compiler.proof.reference import recorded
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Run
from adaptc.rewriter.expression import FoldedWeight
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import Weight


@dataclass(frozen=True)
class ProgramArtifact:
    """A program that was written and proved.

    Attributes:
        file: the program's file.
        computes: the graph that it computes, which rounds activations if the file does.
        proof: that it computes this.
        about: what a manifest says of it.
        errors: what quantization costs it; None where nothing is quantized.
        alternatives: name -> the program with this one of the adapters that it takes.
    """

    file: OnnxFile
    computes: Graph
    proof: Proof
    about: Mapping[str, Any]
    errors: QuantizationErrors | None
    alternatives: Mapping[str, ProvedAlternative] = field(default_factory=dict[str, "ProvedAlternative"])


@dataclass(frozen=True)
class ProvedAlternative:
    """An adapter that a program takes, proved.

    Attributes:
        tensors: the adapter as the program takes it.
        computes: the graph that the program computes with it.
        proof: that it does.
    """

    tensors: Mapping[str, torch.Tensor]
    computes: Graph
    proof: Proof


def write_program(program: Program, entry: OnnxEmit, to: Destination) -> ProgramArtifact:
    """Write a program as `write_onnx` does, and prove it.

    Raises:
        AdaptcError: it cannot be made or written, or its proof failed.
    """
    graphs = fold(program) if entry.adapters == "folded" else None
    graph = graphs.written if graphs is not None else _unfolded(program, entry.adapters)

    file = write_onnx(program, graph, entry, to)
    rounding = losses(graph.weights)
    graph.weights.update({n: w for n, w in file.weights.items() if n in graph.weights})

    folded = prove_fold(program, graphs) if graphs is not None else None  # of the weights that were written
    proof, reference, rounded = prove_onnx(program, graph, folded, file)

    quantized = graphs.quantized if graphs is not None else None
    errors = program.quantization_errors(quantized, rounded) if entry.adapters != "none" else None
    about: dict[str, Any] = {"adapters": entry.adapters, **file.about}
    if graphs is not None:
        operations = {"base": len(program.base.operations), "folded": len(graph.operations)}
        about |= {"rounding": rounding, "operations": operations}
    about |= proved(program, proof, reference) | errors_of(errors)
    return ProgramArtifact(file, rounded or graph, proof, about, errors)


def _unfolded(program: Program, adapters: str) -> Graph:
    """The graph of an ONNX file with live adapters, or with none."""
    check_finite(program.graph)
    return program.compact_graph() if adapters == "live" else program.bare_graph()


def proved(program: Program, proof: Proof, reference: Run) -> dict[str, Any]:
    """An artifact's `proof`, and the `reference` values that prove it again later."""
    return {"proof": asdict(proof), "reference": recorded(reference, program.proofs, proof)}


def errors_of(errors: QuantizationErrors | None) -> dict[str, Any]:
    """What quantization costs an artifact, as `quantization`; empty where nothing is quantized."""
    return {"quantization": errors.to_json()} if errors else {}


def losses(weights: Mapping[str, Weight]) -> dict[str, float]:
    """Each folded weight -> the error of rounding it to the storage dtype, relative to its largest value."""
    folded = {name: weight for name, weight in weights.items() if isinstance(weight, FoldedWeight)}
    return {name: weight.rounding for name, weight in folded.items() if weight.rounding is not None}
