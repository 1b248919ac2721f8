"""The program of a module that was loaded: its graphs are read off the artifact, so that it takes more adapters."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import fx

from adaptc.checkpoints.module_adapters import own_records
from adaptc.checkpoints.records import AdapterRecord
from adaptc.compiler.alternatives.maker import ProgramMaker
from adaptc.compiler.plan.plan import make_plan
from adaptc.compiler.plan.report import plan_report
from adaptc.compiler.plan.schedule import lowering
from adaptc.compiler.program import Program
from adaptc.compiler.rewrite import Rewritten, rewrite
from adaptc.compiler.trainable import follow
from adaptc.emit.torch import alone
from adaptc.errors import AdaptcError
from adaptc.inputs import InputSpec
from adaptc.ir.alternative import Entries
from adaptc.ir.base import Base, Bound
from adaptc.ir.conversion import META
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import copy_nodes
from adaptc.ir.row_calls import RowsGraph
from adaptc.ir.switched import SwitchedModule
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import Pass, run
from adaptc.spec.spec import load as load_spec
from adaptc.tracing.module import held_weights
from adaptc.tracing.trace import trace_base


class LoadedMaker:
    """Makes alternatives of a module that was loaded.

    Args:
        module: the module.
    """

    def __init__(self, module: SwitchedModule):
        self.module = module

    @cached_property
    def _maker(self) -> ProgramMaker:
        return ProgramMaker(program_of_module(self.module))

    def make(self, name: str, entries: Entries) -> fx.GraphModule:
        """As `ProgramMaker.make`, on the graph of the artifact.

        Raises:
            AdaptcError: adapters that are always on, or weights in few bits, are part of that graph.
        """
        return self._maker.make(name, entries)

    def forget(self, name: str) -> None:
        """Forget an alternative."""
        self._maker.forget(name)

    def rows(self) -> RowsGraph:
        """As `ProgramMaker.rows`; each alternative of the artifact is proved to be as it was written.

        Raises:
            AdaptcError: one cannot be inserted anew as its record says.
        """
        program = self._maker.program
        earlier = program.alternatives
        program.alternatives = {
            name: earlier[name] if name in earlier else _inserted_anew(program, self.module, name)
            for name in self.module.adapters
        }
        return self._maker.rows()


def program_of_module(module: SwitchedModule) -> Program:
    """The program of a module that was loaded, whose alternatives are those that the artifact holds.

    Raises:
        AdaptcError: adapters that are always on, or few bits, are part of its graph.
    """
    about = module.meta_of(None)[META]
    if about["adapters"] or about["quantized"]:
        part = "adapters that are always on" if about["adapters"] else "weights in few bits"
        raise AdaptcError(
            f"no adapter can be added to this artifact: its graph has {part}",
            "name the adapter under `adapters` in its spec, and compile that",
        )
    base = _graph(module, None)
    spec = load_spec({"adapters": {}})
    plan = make_plan(spec, base)
    rewritten = rewrite(spec, base, plan)
    program = Program(spec, plan_report(spec, base, plan, rewritten), base, rewritten)
    program.base_sha256, program.base_record = about["base"]["sha256"], about["base"]
    program.module = module
    return program


def _inserted_anew(program: Program, module: SwitchedModule, name: str) -> Program:
    """The program of an alternative that an artifact holds: its methods are inserted again, as its records say.

    Raises:
        AdaptcError: that gives other tensors than the artifact has.
        ProofError: it computes something else.
    """
    records = own_records(module, name)
    adapted = run(program.graph, [_insertion(record) for record in records])
    held = {tensor.name: tensor.shape for record in records for tensor in record.tensors}
    if {n: adapted.weights[n].shape for n in adapted.inserted} != held:
        raise AdaptcError(
            f"rows with adapters that were added need {name!r} inserted anew, which its record does not tell",
            "name the added ones under `adapters` in the spec, and compile that",
        )
    follow(adapted, module)
    rewritten = Rewritten(adapted, run(adapted, lowering(adapted)), None, [], [])
    made = Program(program.spec, program.plan, program.base, rewritten)
    made.main, made.adapted_in_both_modes = program, adapted
    reference = program.proofs.run(_graph(module, name))
    candidate = program.proofs.run_like(reference, made.live_graph())
    program.proofs.prove(f"{name}, inserted anew", adapted, reference, candidate)
    return made


def _insertion(record: AdapterRecord) -> Pass:
    """The pass that inserts what a record tells of."""
    return Insert[Any, Any](
        record.instance,
        target=record.patterns,
        adapter=record.adapter,
        entry=record.entry,
        on_alias="share" if record.tied else "refuse",
        trained=True,
    )


def _graph(module: SwitchedModule, name: str | None) -> Graph:
    """The graph of an alternative, on the module's tensors."""
    about = module.meta_of(name)[META]
    program = alone(module, copy_nodes(module.graph_of(name)), about, ())
    inputs = tuple(InputSpec.from_json(spec) for spec in about["inputs"])
    return trace_base(
        Base(
            describe=about["base"]["name"],
            model=None,
            program=program,
            inputs=inputs,
            find=lambda: Bound(held_weights(program)),
            heads=frozenset(about["heads"]),
        )
    )
