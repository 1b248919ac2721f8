"""The proofs of one compile: what was compared, on which inputs, and with which result."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn

from adaptc.compiler.proof import (
    BatchRunner,
    Proof,
    batches,
    check_weights,
    effect,
    gradients,
    module_call,
    prove,
    randomised,
    tolerance,
)
from adaptc.errors import ProofError, TraceError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Interpreter, Run
from adaptc.ir.laws import DROPOUTS
from adaptc.ir.module import bind
from adaptc.ir.nodes import operation, provenance, writes_in_place

STRENGTHS = (1.0, 8.0, 64.0)
"""Strengths of random adapters, tried in order until their effect shows in the outputs."""


class Proofs:
    """The proofs that held so far, and the random inputs that all of them run on.

    Attributes:
        base: the traced graph.
        seed: the seed of random inputs and adapters.
        held: the proofs that held, each name once.
    """

    def __init__(self, base: Graph, seed: int):
        self.base, self.seed = base, seed
        self.held: list[Proof] = []

    @cached_property
    def batches(self) -> Batches:
        """Random inputs of every shape that a proof runs on."""
        return batches(self.base.inputs, self.seed)

    def has(self, name: str) -> bool:
        """Whether a proof of this name held."""
        return any(proof.name == name for proof in self.held)

    def prove(
        self, name: str, graph: Graph, reference: Run, candidate: Run, allowed: float | None = None
    ) -> Proof:
        """Compare two runs and keep the proof, in place of an earlier one of this name.

        Args:
            name: what is proved.
            graph: the graph whose dtypes set the tolerance.
            reference: the run with the expected outputs, on `batches`.
            candidate: the other run, of the batches that the reference takes.
            allowed: a relative error to tolerate in place of the dtype's.

        Raises:
            ProofError: they differ.
            WeightError: they differ, and a weight of the base contains NaN or infinity.
        """
        try:
            proof = prove(name, reference, candidate, tolerance(graph) if allowed is None else allowed)
        except ProofError:
            check_weights(self.base)
            raise
        self.held = [p for p in self.held if p.name != name] + [proof]
        return proof

    def run(self, graph: Graph) -> Run:
        """One run of a graph on every batch, in float32 or wider."""
        return Interpreter(graph, wide=True).on(self.batches)

    def run_like(self, reference: Run, graph: Graph) -> Run:
        """One run of a graph on the batches that the reference takes, with its choices between near ties."""
        interpreter = Interpreter(graph, wide=True)
        return interpreter.on(reference.taken, follows=reference, near=tolerance(graph))

    def trace(self, model: nn.Module) -> Proof:
        """Prove that the traced graph computes what the model does.

        Raises:
            WeightError: a weight contains NaN or infinity.
            TraceError: two runs of the model itself give different outputs.
            ProofError: they differ.
        """
        # A copy where the model writes to its own weights, such as an embedding with `max_norm`.
        writes = any(writes_in_place(node.target) for node in self.base.nodes)
        eager = BatchRunner(module_call(copy.deepcopy(model) if writes else model))
        first = eager.on(self.batches)
        try:
            return self.prove("trace", self.base, first, Interpreter(self.base).on(first.taken))
        except ProofError:
            if not _equal(first, eager.on(self.batches)):
                raise TraceError(
                    f"two runs of {type(model).__name__} on the same inputs in evaluation mode gave different outputs",
                    *self._random_line(),
                    "expected a model that is random in training only",
                    "let it depend on self.training, as nn.Dropout and F.dropout(x, p, self.training) do",
                ) from None
            raise

    def _random_line(self) -> list[str]:
        """The line of the first operation of the base that draws random numbers in evaluation; none if none does."""
        seeded = torch.Tag.nondeterministic_seeded
        drawing = [node for node in self.base.nodes if seeded in getattr(node.target, "tags", ())]
        drawing = [node for node in drawing if node.target not in DROPOUTS]
        return [f"drawn by {operation(node)}, {' '.join(provenance(node))}" for node in drawing[:1]]

    def randomised(self, adapted: Graph) -> tuple[Graph, Run]:
        """The adapted graph with random adapters whose effect a proof cannot miss, and a run of it.

        Returns:
            The graph, and its run on every batch.
        """
        weakest, *stronger = STRENGTHS
        graph = randomised(adapted, self.seed, weakest)
        run = self.run(graph)
        base = self._base_on_first(run)
        for strength in stronger:
            if _shows(base, run, adapted):
                break
            graph = randomised(adapted, self.seed, strength)
            run = self.run(graph)
        return graph, run

    def shows(self, run: Run, adapted: Graph) -> bool:
        """Whether a run's adapters change the base's outputs by more than ten times the tolerance."""
        return _shows(self._base_on_first(run), run, adapted)

    def _base_on_first(self, run: Run) -> Run:
        """A run of the base on the first batch that another run took."""
        return Interpreter(self.base, wide=True).on(dict(list(run.taken.items())[:1]))


def check_finite(graph: Graph) -> None:
    """Check that every parameter of the adapters is finite.

    Raises:
        ProofError: names the first that is not.
    """
    for name in graph.adapter_names:
        if not torch.isfinite(graph.weights[name].load()).all():
            raise ProofError(f"{name} contains NaN or infinity (non-finite): the training diverged")


def check_gradients(trainable: Graph) -> None:
    """Check that every trained parameter of a graph gets a gradient, with random adapters and inputs.

    Raises:
        ProofError: a parameter gets none, or is not finite.
    """
    check_finite(trainable)
    graph = randomised(trainable)
    gradients(bind(graph, graph.adapter_names), graph, graph.adapter_names)


def _shows(base: Run, run: Run, adapted: Graph) -> bool:
    """Whether two runs differ by ten times the tolerance: chosen so that a missing adapter fails a proof clearly."""
    return effect(base, run) > 10 * tolerance(adapted)


def _equal(first: Run, second: Run) -> bool:
    """Whether two runs gave the same values, bit by bit, on the batches that both took."""
    for name in first.taken.keys() & second.taken.keys():
        a, b = first.outcomes[name], second.outcomes[name]
        if isinstance(a, list) and isinstance(b, list) and not all(map(torch.equal, a, b)):
            return False
    return True
