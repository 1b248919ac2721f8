"""Programs in which each row of a batch has its own adapter: written, and proved row by row."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from adaptc.compiler.alternatives.rows_graph import with_stacks
from adaptc.compiler.artifacts.onnx import Destination, write_onnx
from adaptc.compiler.artifacts.onnx_file import OnnxFile
from adaptc.compiler.artifacts.onnx_proof import prove_onnx
from adaptc.compiler.artifacts.program import proved
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proofs import check_finite
from adaptc.spec.emit import OnnxEmit


def write_rows(program: Program, entry: OnnxEmit, to: Destination) -> tuple[OnnxFile, Mapping[str, Any]]:
    """Write all alternatives as one program with the input `adapter_ids`, and prove each row beside its adapter alone.

    Returns:
        The file, and what a manifest says of it.

    Raises:
        RefusedError: rows meet, or an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
        ProofError: a row gets something else.
    """
    for other in program.alternatives.values():
        check_finite(other.graph)
    rows = program.by_row()
    _, expected = rows.prove()
    stand_in = copy(program)
    stand_in.proofs = rows.proofs
    told = {"adaptc.rows": ", ".join(program.alternatives)}
    graph = with_stacks(rows.graph)
    file = write_onnx(stand_in, graph, entry, to, told=told)
    proof, reference, _ = prove_onnx(stand_in, graph, expected, file)
    for held in rows.proofs.held:
        program.proofs.keep(held)
    about: dict[str, Any] = {"adapters": entry.adapters, **file.about, "rows": list(program.alternatives)}
    if rows.sizes:
        about["sizes"] = rows.sizes
    return file, about | proved(stand_in, proof, reference)
