"""The proofs of one compile: what was compared, on which inputs, and with which result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from adaptc.compiler.proof.differences import is_label
from adaptc.compiler.proof.gradient_check import gradients
from adaptc.compiler.proof.inputs import Draw, draws, grown
from adaptc.compiler.proof.proof import (
    Proof,
    check_weights,
    effect,
    labels_differ,
    prove,
    randomised,
    tolerance,
)
from adaptc.compiler.proof.repeats import check_repeats
from adaptc.compiler.proof.runners import BatchRunner, Runner, module_call
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Interpreter, Outcome, Run
from adaptc.ir.module import bind
from adaptc.ir.nodes import writes_in_place

STRENGTHS = (1.0, 8.0, 64.0)
"""Strengths of random adapters, tried in order until their effect shows in the outputs."""


class Proofs:
    """The proofs that held so far, and the inputs that all of them run on.

    Attributes:
        base: the traced graph.
        seed: of the random inputs and adapters.
        stated: the relative error that the spec allows; None where it states none.
        drawn: the random inputs, by label.
        batches: a person's own inputs and the random ones, by label.
        held: the proofs that held, each name once.
    """

    def __init__(self, base: Graph, seed: int, stated: float | None = None):
        self.base, self.seed, self.stated = base, seed, stated
        self.drawn = draws(base.inputs, seed, base.proof_shapes)
        self.batches = self._all_batches()
        self.held: list[Proof] = []
        self._weights_checked = False
        self._base_runs: dict[str, Run] = {}

    def _all_batches(self) -> Batches:
        random = {label: draw.batch(self.base.inputs) for label, draw in self.drawn.items()}
        return {**self.base.examples, **random}

    def tolerance(self, graph: Graph) -> float:
        """The relative error that the spec states, or else that a graph's dtypes allow."""
        return tolerance(graph) if self.stated is None else self.stated

    def has(self, name: str) -> bool:
        """Whether a proof of this name held."""
        return any(proof.name == name for proof in self.held)

    def prove(
        self, name: str, graph: Graph, reference: Run, candidate: Run, allowed: float | None = None
    ) -> Proof:
        """Compare two runs and keep the proof, in place of an earlier one of this name.

        Args:
            name: what is proved.
            graph: what the reference computes, whose dtypes and own rounding set the tolerance.
            reference: the run with the expected outputs, on `batches`.
            candidate: the other run, of the batches that the reference takes.
            allowed: a relative error to tolerate in place of that.

        Raises:
            ProofError: they differ.
            WeightError: they differ, and a weight of the base contains NaN or infinity.
        """
        try:
            proof = prove(
                name,
                reference,
                candidate,
                self.tolerance(graph) if allowed is None else allowed,
                graph,
                measured=allowed is None and self.stated is None,
            )
        except ProofError:
            self._check_weights()
            raise
        if proof.uncompared:
            self._check_weights()
        return self.keep(replace(proof, notes=(*proof.notes, *self._notes(proof, reference))))

    def keep(self, proof: Proof) -> Proof:
        """Keep a proof that held, in place of an earlier one of its name."""
        self.held = [p for p in self.held if p.name != proof.name] + [proof]
        return proof

    def forget(self, name: str) -> None:
        """Drop a proof of something that is no more."""
        self.held = [proof for proof in self.held if proof.name != name]

    def _check_weights(self) -> None:
        """Check once that no proof fails, and no output is NaN, since a weight is not finite."""
        if not self._weights_checked:
            check_weights(self.base)
            self._weights_checked = True

    def _notes(self, proof: Proof, reference: Run) -> list[str]:
        """What a proof must tell of its inputs and its tolerance."""
        notes = [] if self.stated is None else ["the spec states the tolerance"]
        compared = {
            label
            for label, outcome in reference.outcomes.items()
            if isinstance(outcome, list)
            and any((label, index) not in proof.uncompared for index in range(len(outcome)))
        }
        if self.base.examples and not compared & self.drawn.keys():
            why = next(iter(proof.skipped.values()), "they give NaN").splitlines()[0]
            notes.append(f"on a person's own inputs alone, since the model does not take random ones ({why})")
        return notes

    def run(self, graph: Graph) -> Run:
        """One run of a graph on every batch, in float32 or wider."""
        return Interpreter(graph, torch.float32).on(self.batches)

    def run_like(self, reference: Run, graph: Graph) -> Run:
        """One run of a graph on the batches that the reference takes, with its choices between near ties."""
        interpreter = Interpreter(graph, torch.float32)
        return interpreter.on(reference.taken, follows=reference, near=self.tolerance(graph))

    def trace(self, model: nn.Module) -> Proof:
        """Prove that the traced graph computes what the model does.

        Raises:
            WeightError: a weight contains NaN or infinity.
            TraceError: two runs of the model itself give different outputs, see `check_repeats`.
            ProofError: they differ.
        """
        # A copy where the model writes to its own weights, such as an embedding with `max_norm`.
        writes = any(writes_in_place(node.target) for node in self.base.nodes)
        eager = BatchRunner(module_call(copy.deepcopy(model) if writes else model))
        first = self._fit(eager, eager.on(self.batches))
        try:
            return self.prove("trace", self.base, first, Interpreter(self.base).on(first.taken))
        except ProofError:
            check_repeats(model, eager, self.base, first.taken)
            raise

    def _fit(self, eager: Runner, run: Run) -> Run:
        """Replace random inputs that the model does not take by larger ones, unless the spec states their sizes.

        Returns:
            The run of the model on the new inputs.
        """
        if self.base.proof_shapes:
            return run
        outcomes = {label: run.outcomes[label] for label in self.base.examples}
        drawn: dict[str, Draw] = {}
        for label, draw in self.drawn.items():
            fitting, outcome = draw, run.outcomes[label]
            if not _is_defined(outcome):
                for larger in grown(draw, self.base.inputs):
                    again = eager.on({"": larger.batch(self.base.inputs)}).outcomes[""]
                    if _is_defined(again):
                        fitting, outcome = larger, again
                        break
            if fitting.label not in drawn:
                drawn[fitting.label], outcomes[fitting.label] = fitting, outcome
        self.drawn = drawn
        self.batches = self._all_batches()
        return Run(self.batches, outcomes)

    def with_random_adapters(
        self, name: str, adapted: Graph, sides: Callable[[Graph], tuple[Graph, Graph]]
    ) -> Proof:
        """Prove a rewrite with random adapters whose effect the proof cannot miss.

        Args:
            name: what is proved.
            adapted: the adapted graph.
            sides: from that graph with random adapters to the graph that is rewritten and the rewritten one.

        Raises:
            ProofError: they differ.
        """
        for strength in STRENGTHS:
            reference, candidate = sides(randomised(adapted, self.seed, strength))
            run = self.run(reference)
            strongest = strength == STRENGTHS[-1]
            if not strongest and not self.shows(run, self.tolerance(adapted)):
                continue
            proof = self.prove(name, reference, run, self.run_like(run, candidate))
            if strongest or self.shows(run, proof.tolerance):
                return proof
        raise AssertionError("there is a strongest")

    def shows(self, run: Run, allowed: float) -> bool:
        """Whether a run's adapters change the base's outputs by so much that a proof cannot miss them.

        That is by ten times what it allows: chosen so that a missing adapter fails it clearly.
        """
        if not run.taken:
            return False
        base = self._base_on_first(run)
        return labels_differ(base, run) or effect(base, run) > 10 * allowed

    def _base_on_first(self, run: Run) -> Run:
        """A run of the base on the first batch that another run took."""
        label, batch = next(iter(run.taken.items()))
        if label not in self._base_runs:
            self._base_runs[label] = Interpreter(self.base, torch.float32).on({label: batch})
        return self._base_runs[label]


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


def _is_defined(outcome: Outcome) -> bool:
    """Whether a model took an input, and gave an output that is no label and has no NaN, or labels alone."""
    if isinstance(outcome, Exception):
        return False
    floats = [value for value in outcome if not is_label(value)]
    return not floats or not all(value.isnan().any() for value in floats)
