"""Programs whose adapters are swapped, and the adapters: written, and proved together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.alternatives.swap import Swap
from adaptc.compiler.artifacts.onnx import Destination, write_onnx
from adaptc.compiler.artifacts.onnx_file import OnnxFile
from adaptc.compiler.artifacts.onnx_proof import prove_onnx
from adaptc.compiler.artifacts.program import ProgramArtifact, ProvedAlternative, proved
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proofs import STRENGTHS
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.errors import ProofError
from adaptc.ir.interpreter import Run
from adaptc.rewriter.swap.prefix import VIRTUAL_TOKENS
from adaptc.rewriter.swap.record import KEY
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import seeded

BASE = "onnx, swap"
"""What proofs call a program without any adapter."""
RANKS = (3, 1, 5)
"""The ranks of the random adapter that a program is proved with, in turn: chosen to differ from site to site."""


def write_swap(swap: Swap, entry: OnnxEmit, to: Destination) -> OnnxFile:
    """Write the base as `write_onnx` does, as a program that takes adapters as inputs: without them it is the base.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    told = {KEY: swap.record().to_json()}
    file = write_onnx(swap.program, swap.open_graph(), entry, to, swap.dims(), told)
    return file if file.unrounded is None else replace(file, unrounded=evaluate(swap.graph()))


def write_swap_program(program: Program, entry: OnnxEmit, to: Destination) -> ProgramArtifact:
    """Write a program as `write_swap` does, and prove it with each of its adapters.

    Raises:
        AdaptcError: it cannot be made or written, or a proof failed.
    """
    swap = Swap(program)
    file = write_swap(swap, entry, to)
    base, reference, alternatives = prove_swap(swap, file)
    proofs = {name: asdict(each.proof) for name, each in alternatives.items()}
    about: dict[str, Any] = {"adapters": entry.adapters, **file.about}
    about |= {"overridable": swap.dims(), "alternatives": proofs}
    about |= proved(program, base.proof, reference)
    return ProgramArtifact(file, base.computes, base.proof, about, None, alternatives)


def prove_swap(swap: Swap, file: OnnxFile) -> tuple[ProvedAlternative, Run, dict[str, ProvedAlternative]]:
    """Prove a program in one session: the base, each alternative, an adapter of other ranks, and the base again.

    Each is compared with the torch graph that has this adapter live.

    Returns:
        The base; the run that the file was compared with; and each alternative, by name.

    Raises:
        ProofError: one differs, or the last run is not the first.
    """
    proofs = swap.program.proofs
    base = proofs.run(swap.program.live_graph())
    graph = swap.graph()
    proof, reference, rounding = prove_onnx(swap.program, graph, base, file)
    first = file.on(proofs.batches)
    alternatives = {
        name: prove_adapter(swap, file, name, swap.tensors(name)) for name in swap.program.alternatives
    }
    _prove_random(swap, file, base)
    if not _equal(first, file.on(proofs.batches)):
        raise ProofError(f"{BASE}: after the adapters the program gives other outputs than before them")
    return ProvedAlternative({}, rounding or graph, proof), reference, alternatives


def prove_adapter(
    swap: Swap, file: OnnxFile, name: str, tensors: Mapping[str, torch.Tensor], path: Path | None = None
) -> ProvedAlternative:
    """Prove that a program with an alternative computes what the torch graph with that alternative does.

    Args:
        swap: the alternatives.
        file: the program.
        name: which alternative.
        tensors: the alternative as the program takes it.
        path: the `.onnx_adapter` file that has them, to be read in their place.

    Raises:
        ProofError: it computes something else.
    """
    live = swap.program.proofs.run(swap.program.alternatives[name].live_graph())
    with_it = _with(swap, file, tensors, f"{BASE}, {name}", path)
    graph = swap.graph(tensors)
    proof, _, rounding = prove_onnx(swap.program, graph, live, with_it)
    return ProvedAlternative(tensors, rounding or graph, proof)


def _with(
    swap: Swap, file: OnnxFile, tensors: Mapping[str, torch.Tensor], name: str, path: Path | None = None
) -> OnnxFile:
    """A program whose runs have an adapter."""
    unrounded = None if file.unrounded is None else evaluate(swap.graph(tensors))
    return replace(file, adapter=path or tensors, unrounded=unrounded, name=name)


def _prove_random(swap: Swap, file: OnnxFile, base: Run) -> None:
    """Prove a program with random tensors in all its slots at once, of ranks that no alternative need have."""
    for strength in STRENGTHS:
        tensors = _random(swap, strength)
        graph = swap.graph(tensors)
        run = swap.program.proofs.run(graph)
        strong = swap.program.proofs.shows(run, swap.program.proofs.tolerance(graph))
        if strong or strength == STRENGTHS[-1]:
            prove_onnx(swap.program, graph, run, _with(swap, file, tensors, f"{BASE}, other ranks"))
            return


def _random(swap: Swap, strength: float) -> dict[str, torch.Tensor]:
    """Random tensors for every slot."""
    tensors: dict[str, torch.Tensor] = {}
    for number, slot in enumerate(swap.slots.weights.values()):
        rank = RANKS[number % len(RANKS)]
        for name, sizes in slot.dims.items():
            shape = [rank if isinstance(size, str) else size for size in sizes]
            noise = torch.randn(shape, generator=seeded(0, name), dtype=torch.float64)
            scale = len(shape) == 1
            tensors[name] = 1 + 0.1 * strength * noise if scale else 0.1 * strength**0.5 * noise
    if swap.slots.prefix is not None:
        shape = (RANKS[0], swap.slots.prefix.columns)
        noise = torch.randn(shape, generator=seeded(0, VIRTUAL_TOKENS), dtype=torch.float64)
        tensors[VIRTUAL_TOKENS] = strength * noise
    for name in swap.slots.whole:
        value = swap.base.weights[name].exact().double()
        tensors[name] = value + 0.1 * strength * torch.randn(
            value.shape, generator=seeded(0, name), dtype=torch.float64
        )
    return swap.rounded(tensors)


def _equal(first: Run, last: Run) -> bool:
    """Whether two runs gave the same bits."""
    for a, b in zip(first.outcomes.values(), last.outcomes.values(), strict=True):
        if isinstance(a, Exception) or isinstance(b, Exception):
            if type(a) is not type(b):
                return False
        elif not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
            return False
    return True
