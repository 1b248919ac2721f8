"""The proofs of one compile: what was held against what, on which inputs, and with which result."""

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
from adaptc.ir.module import bind
from adaptc.ir.nodes import writes_in_place

STRENGTHS = (1.0, 8.0, 64.0)
"""How strong random adapters are made, one after the other, until their effect shows."""


class Proofs:
    """What was proved so far, and what it takes to prove more: all sides run on the same random inputs.

    Attributes:
        base: the traced graph.
        seed: of the random inputs, and of random adapters.
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
        """Hold two runs against one another and keep the proof; an earlier one of this name is replaced.

        Args:
            name: what is proved.
            graph: the dtype of its weights says what error is tolerated.
            reference: what must come out, of `batches`.
            candidate: what came out of the other side, of those that the reference takes.
            allowed: the relative error that is tolerated in place of the dtype's.

        Raises:
            ProofError: they differ.
            WeightError: the base holds a weight that is no number.
        """
        try:
            proof = prove(name, reference, candidate, tolerance(graph) if allowed is None else allowed)
        except ProofError:
            check_weights(self.base)
            raise
        self.held = [p for p in self.held if p.name != name] + [proof]
        return proof

    def run(self, graph: Graph) -> Run:
        """What a graph gives, computed in float32 at least."""
        return Interpreter(graph, wide=True).on(self.batches)

    def run_like(self, reference: Run, graph: Graph) -> Run:
        """What a graph gives with the reference's choices between near equals, on the batches that it takes."""
        interpreter = Interpreter(graph, wide=True)
        return interpreter.on(reference.taken, follows=reference, near=tolerance(graph))

    def trace(self, model: nn.Module) -> Proof:
        """The traced graph computes what the model does.

        Raises:
            WeightError: a weight is no number.
            TraceError: no two runs of the model itself agree.
            ProofError: they differ.
        """
        changes = any(
            writes_in_place(node.target) for node in self.base.nodes
        )  # such as an embedding with `max_norm`
        eager = BatchRunner(module_call(copy.deepcopy(model) if changes else model))
        first = eager.on(self.batches)
        try:
            return self.prove("trace", self.base, first, Interpreter(self.base).on(first.taken))
        except ProofError:
            if not _equal(first, eager.on(self.batches)):
                raise TraceError(
                    f"{type(model).__name__} draws random numbers in evaluation mode too, so that no two runs agree",
                    "expected a model that is random in training only",
                    "let it depend on self.training, as nn.Dropout and F.dropout(x, p, self.training) do",
                ) from None
            raise

    def randomised(self, adapted: Graph) -> tuple[Graph, Run]:
        """The adapted graph with random adapters whose effect a proof could not miss, and what it gives."""
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
        """Whether adapters change the base's outputs so much that no proof could miss it."""
        return _shows(self._base_on_first(run), run, adapted)

    def _base_on_first(self, run: Run) -> Run:
        """What the base gives for the first batch that another run took."""
        return Interpreter(self.base, wide=True).on(dict(list(run.taken.items())[:1]))


def check_finite(graph: Graph) -> None:
    """No adapter holds NaN or infinity.

    Raises:
        ProofError: names the first that does.
    """
    for name in graph.adapter_names:
        if not torch.isfinite(graph.weights[name].load()).all():
            raise ProofError(f"{name} holds NaN or infinity: the training diverged")


def check_gradients(trainable: Graph) -> None:
    """Every trained parameter of a graph gets a gradient, and nothing else does.

    Raises:
        ProofError: names what does not.
    """
    check_finite(trainable)
    graph = randomised(trainable)
    gradients(bind(graph, graph.adapter_names), graph, graph.adapter_names)


def _shows(base: Run, run: Run, adapted: Graph) -> bool:
    return effect(base, run) > 10 * tolerance(adapted)


def _equal(first: Run, second: Run) -> bool:
    """Whether two runs gave the same values, bit by bit, wherever both gave any."""
    for name in first.taken.keys() & second.taken.keys():
        a, b = first.outcomes[name], second.outcomes[name]
        if isinstance(a, list) and isinstance(b, list) and not all(map(torch.equal, a, b)):
            return False
    return True
