"""Alternatives of a compiled module that come and go after the compile."""

from __future__ import annotations

from torch import fx

from adaptc.checkpoints.module_adapters import tensors_of
from adaptc.compiler.alternatives.alternatives import one_more
from adaptc.compiler.program import Program
from adaptc.compiler.trainable import follow, trainable_title
from adaptc.errors import AdaptcError
from adaptc.ir.alternative import Entries
from adaptc.ir.graph import Graph
from adaptc.ir.row_calls import RowsGraph


class ProgramMaker:
    """Makes alternatives of a program's module, and keeps the program in step: what it emits next has them too.

    Args:
        program: the program of what is always on.
    """

    def __init__(self, program: Program):
        self.program = program

    def make(self, name: str, entries: Entries) -> fx.GraphModule:
        """Plan, insert and prove one more alternative on the graph as it was traced.

        Returns:
            Its module, which shares the tensors of the base.

        Raises:
            SpecError: an entry is wrong, or cannot be done.
            WeightError: a checkpoint does not fit the base.
            ProofError: the trainable graph computes something else than the adapted one.
        """
        program = self.program
        spec = program.spec.with_adapter(name, entries)
        others = {other: (each.spec, each.graph) for other, each in program.alternatives.items()}
        planned = one_more(spec, name, program.base, program.plan, program.graph, others)
        _check_free(name, planned.rewritten.adapted, program)
        made = Program(planned.spec, planned.plan, program.base, planned.rewritten)
        made.main = program
        module = program.bound(name, made, program.module)
        follow(made.graph, program.module)
        program.spec, program.slots = spec, None
        program.alternatives[name], program.plan.alternatives[name] = made, planned.plan
        return module

    def forget(self, name: str) -> None:
        """Forget an alternative, and what was proved of it."""
        program = self.program
        program.spec, program.slots = program.spec.without_adapter(name), None
        program.alternatives.pop(name, None)
        program.plan.alternatives.pop(name, None)
        program.proofs.forget(trainable_title(name))

    def rows(self) -> RowsGraph:
        """The graph of calls that name the adapter of each row.

        Raises:
            RefusedError: rows meet, or there are none.
            ProofError: a row gets something else than from its adapter alone.
        """
        return self.program.trainable_rows()


def _check_free(name: str, adapted: Graph, program: Program) -> None:
    """Check that the tensors of a new alternative have names of their own in the module.

    Raises:
        AdaptcError: one has a name that is taken.
    """
    held = tensors_of(program.module).keys() - program.graph.weights.keys()
    taken = next((tensor for tensor in adapted.inserted if tensor in held), None)
    if taken is not None:
        message = f"{name!r}: the module has a tensor {taken} already, of another adapter"
        raise AdaptcError(message, "give the entry a `name` of its own")
