"""A compiled program: the base, the adapted graph, and the graphs that are made of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from adaptc.checkpoints.compaction import compacted
from adaptc.checkpoints.graph_records import records_of
from adaptc.checkpoints.module_adapters import AlternativeFiles, load_adapter_into, tensors_of
from adaptc.compiler.alternatives.rows import ByRow, rows_graph
from adaptc.compiler.generation import Generator
from adaptc.compiler.plan.adapter_weights import load_checkpoints
from adaptc.compiler.plan.report import PlanReport
from adaptc.compiler.plan.schedule import lower
from adaptc.compiler.proof.proofs import Proofs
from adaptc.compiler.proof.quantization_error import QuantizationErrors, measure
from adaptc.compiler.rewrite import After, Rewritten
from adaptc.compiler.trainable import (
    base_of_both_modes,
    follow,
    following,
    module_record,
    prove_trainable,
    take_original_calls,
    trainable_title,
)
from adaptc.ir.alternative import Maker
from adaptc.ir.conversion import META
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.ir.module import bind
from adaptc.ir.row_calls import RowsGraph
from adaptc.ir.switched import SwitchedModule, switched
from adaptc.progress.steps import step
from adaptc.quantization.quantized_weight import QuantizedPart
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES, Pass, run
from adaptc.rewriter.quantize import Quantize
from adaptc.rewriter.swap.slots import Slots
from adaptc.spec.spec import Spec
from adaptc.tracing.huggingface.module import pretrained
from adaptc.weights import Deferred, Held

LOG = logging.getLogger(__name__)


class Program:
    """The graphs of a compile. A method that makes one gives a new graph, with the adapters as they stand.

    Attributes:
        spec: the spec as resolved.
        plan: sites, cost and pipeline.
        base: the traced graph.
        graph: the adapted graph; its adapter weights follow the trainable module once that is made.
        factored: the adapted graph as it is run live, without weights of its own.
        records: what each pass did.
        proofs: what was proved so far.
        after: called with a pass's name and the graph after each pass that `records` tell of.
        alternatives: the model with each of `adapters` beside what is always on, by name.
        slots: what an ONNX program has to take any one of them; None where there are none, or one does not fit.
        main: of an alternative's program, that of what is always on, with whose module its own shares all tensors.
        maker: makes more alternatives and forgets them; None where the spec has no `adapters`.
    """

    def __init__(
        self,
        spec: Spec,
        plan: PlanReport,
        base: Graph,
        rewritten: Rewritten,
        after: After | None = None,
        alternatives: Mapping[str, Program] | None = None,
        slots: Slots | None = None,
    ):
        self.spec, self.plan, self.base, self.after = spec, plan, base, after
        self.alternatives, self.slots = dict(alternatives or {}), slots
        self.main: Program | None = None
        self.maker: Maker | None = None
        for other in self.alternatives.values():
            other.main = self
        self.graph, self.factored = rewritten.adapted, rewritten.factored
        self.records = list(rewritten.records)
        self._generator: tuple[bool, Generator] | None = None
        self.proofs = Proofs(base, spec.seed, spec.proof.tolerance if spec.proof else None)
        load_checkpoints(spec, plan.entries, base, self.graph)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The trainable module: only the adaptation requires grad, and train()/eval() are followed.

        From then on the adapted graph has the adapters that the module has, and its buffers.

        Raises:
            ProofError: it computes something else than the adapted graph.
        """
        graph = self.trainable_graph()
        prove_trainable(self.proofs, self.graph, graph)
        shared = tensors_of(self.main.module) if self.main is not None else None
        module = bind(graph, graph.adapter_names, shared)
        module.meta[META] = module_record(graph, self.base_record)
        if self.maker is not None:
            module = self._switched(module, self.maker)
        take_original_calls(module, self.base.source.flatten)
        follow(self.graph, module)
        return module

    def _switched(self, module: fx.GraphModule, maker: Maker) -> SwitchedModule:
        """A module with a graph for each alternative beside its own; their adapted graphs follow it too.

        Raises:
            ProofError: the graph of one computes something else than its adapted graph.
        """
        modules = {name: self.bound(name, other, module) for name, other in self.alternatives.items()}
        made = switched(module, modules, AlternativeFiles())
        for other in self.alternatives.values():
            follow(other.graph, made)
        made.let_choose(maker.rows)
        made.let_change(maker)
        return made

    def bound(self, name: str, other: Program, module: fx.GraphModule) -> fx.GraphModule:
        """The trainable module of an alternative, with the tensors of another where it has them.

        Args:
            name: of the alternative.
            other: its program.
            module: whose tensors are taken.

        Raises:
            ProofError: it computes something else than its adapted graph.
        """
        graph = other.trainable_graph()
        prove_trainable(self.proofs, other.graph, graph, trainable_title(name))
        made = bind(graph, graph.adapter_names, tensors_of(module), f"{name}_")
        made.meta[META] = module_record(graph, self.base_record)
        return made

    def by_row(self, trainable: bool = False) -> ByRow:
        """The alternatives in one graph, in which each row of a batch has its own, with the adapters as they stand.

        Args:
            trainable: it reads `training`.

        Raises:
            RefusedError: rows meet, or there are none.
        """
        programs = [self, *self.alternatives.values()]
        adapted = [
            program.adapted_in_both_modes.copy() if trainable else program.graph for program in programs
        ]
        for graph, program in zip(adapted, programs, strict=True):
            graph.weights.update(program.graph.weights)
        alone = [program.live_graph() for program in programs]
        return ByRow(adapted, alone, self.base, list(self.alternatives), self.proofs, trainable)

    def trainable_rows(self) -> RowsGraph:
        """The graph of calls of the module that name the adapter of each row, proved.

        Raises:
            RefusedError: rows meet, or there are none.
            ProofError: a row gets something else than from its adapter alone.
        """
        rows = self.by_row(trainable=True)
        self.proofs.keep(rows.prove()[0])
        return rows_graph(rows.graph, self.base_record)

    def load_adapter(self, directory: Path, ignore: Sequence[str] = ()) -> tuple[str, ...]:
        """Replace the adapters' weights by those of a checkpoint, in the module and in the adapted graph.

        Args:
            directory: the checkpoint.
            ignore: options of its configuration to read it without.

        Returns:
            How it was read, for the person.

        Raises:
            WeightError: it does not fit what was inserted.
        """
        module = self.module
        model = pretrained(self.graph.source.model)
        loaded = load_adapter_into(module, directory, ignore, model)
        for name, value in loaded.values.items():
            stored = Deferred(tuple(value.shape), self.graph.weights[name].dtype, value.detach)
            self.graph.weights[name] = following(module, name, stored)
        return loaded.notes

    def trainable_graph(self) -> Graph:
        """The factored graph in both modes, with the adapters as they stand."""
        graph = self._both_modes.copy()
        graph.weights.update(self.graph.weights)
        return graph

    @cached_property
    def _both_modes(self) -> Graph:
        """The factored graph that reads `training`."""
        return lower(self.adapted_in_both_modes)

    @cached_property
    def adapted_in_both_modes(self) -> Graph:
        """The adapted graph that reads `training`; its adapters are as initialised."""
        return run((self.main or self)._base_of_both_modes, self.plan.opening)

    @cached_property
    def _base_of_both_modes(self) -> Graph:
        """The traced graph that reads `training`: made once, since it needs a second trace of the model."""
        return base_of_both_modes(self.base)

    def live_graph(self, adapted: Graph | None = None) -> Graph:
        """The factored graph in evaluation mode, with the adapters of `adapted`, or as they stand."""
        graph = self.factored.copy()
        graph.weights.update((adapted or self.graph).weights)
        return graph

    def generator(self, compiled: bool = False) -> Generator:
        """What writes texts by the live graph. It is made once, and again when the trainable module is made.

        Args:
            compiled: let torch compile it.
        """
        shared = "module" in self.__dict__
        if self._generator is None or self._generator[0] != shared:
            graph = self.live_graph()
            if shared:  # no weight is loaded twice, and training is followed
                tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
                graph.weights.update({n: Held(tensors[n]) for n in graph.weights.keys() & tensors.keys()})
            self._generator = shared, Generator(graph, self.base.source)
        generator = self._generator[1]
        if compiled:
            graph_module: Any = generator.step.graph
            graph_module.compile(dynamic=True)
        return generator

    def compact_graph(self) -> Graph:
        """The live graph without the ranks or entries that training has pruned."""
        records = records_of(self.graph)
        smaller, values = compacted(records, self.tensors())
        pruned = {
            (new.entry, new.method): new for old, new in zip(records, smaller, strict=True) if new is not old
        }
        if not pruned:
            return self.live_graph()
        passes: list[Pass] = []
        for item in self.plan.opening:
            insert = _insert(item)
            new = pruned.get((insert.entry, insert.method.name)) if insert else None
            passes.append(replace(insert, method=new.instance) if insert and new else item)
        graph = self._with_bits(run(self.base, passes))
        for name, param in graph.inserted.items():
            if param.stored:
                graph.weights[name] = Held(values[name].to(graph.weights[name].dtype))
        return lower(graph)

    def bare_graph(self) -> Graph:
        """The model without adapters; quantized, if the spec asks for that."""
        quantizes = list(dict.fromkeys(item for item in self.plan.passes if isinstance(item, Quantize)))
        return lower(self._with_bits(run(self.base, quantizes)))

    def float_graph(self) -> Graph:
        """The model in floats with its adapters, without those that compensate for the error of quantization."""
        passes = [item for item in self.plan.opening if not isinstance(item, Quantize)]
        return self._adapted_by([p for p in passes if not ((i := _insert(p)) and i.method.compensates)])

    def bits_graph(self) -> Graph:
        """The adapted graph as it was before any pass dequantized it."""
        opening = self.plan.opening
        passes = [item for item in opening if not isinstance(item, PASSES["dequantize"])]
        return self.graph if len(passes) == len(opening) else self._adapted_by(passes)

    def _adapted_by(self, passes: Sequence[Pass]) -> Graph:
        """The base rewritten by these passes, with the adapters as they stand."""
        graph = run(self.base, passes)
        names = {name for name, param in self.graph.inserted.items() if param.stored}
        graph.weights.update({name: self.graph.weights[name] for name in names & graph.weights.keys()})
        return graph

    def _with_bits(self, graph: Graph) -> Graph:
        """A graph that was quantized again, with the codes of the first time: computing them anew would take long."""
        bits = {name: w for name, w in self.graph.weights.items() if isinstance(w, QuantizedPart)}
        graph.weights.update({name: bits[name] for name in bits.keys() & graph.weights.keys()})
        return graph

    def prove_trace(self) -> None:
        """The traced graph computes what the model does, where the model is there to run.

        Raises:
            TraceError: no two runs of the model itself agree.
            ProofError: they differ.
        """
        source = self.base.source
        if source.real and source.model is not None:
            self.proofs.trace(source.model)

    def reference(self, graph: Graph, run: Run | None, wide: bool = False) -> Run:
        """The run of a graph that an artifact is compared with.

        Args:
            graph: the graph.
            run: an earlier run of it in float32, if there is one. It is taken unless it followed another run's
                choices against its own, or ran in another dtype than asked for.
            wide: compute in float32 what the graph computes in float16 or bfloat16.
        """
        narrow = Interpreter(graph, torch.float32).widens
        if run is not None and not run.flipped and (wide or not narrow):
            return run
        return Interpreter(graph, torch.float32 if wide else None).on(self.proofs.batches)

    def quantization_errors(
        self, quantized: Graph | None = None, rounding: Graph | None = None
    ) -> QuantizationErrors | None:
        """What quantization costs, against the float model with the same adapters.

        Args:
            quantized: the graph after the spec's passes that follow `fold`, in place of the adapted one.
            rounding: the graph that rounds activations as the artifact does, if the artifact does.

        Returns:
            The errors; None where nothing is quantized.
        """
        candidate = quantized if quantized is not None and quantized.quantized else self.bits_graph()
        if not candidate.quantized:
            return None
        return measure(self.float_graph(), candidate, self.spec.seed, rounding)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapters' tensors that checkpoints hold, as they stand, in their own dtype: name -> tensor."""
        stored = [name for name, param in self.graph.inserted.items() if param.stored]
        return {name: self.graph.weights[name].exact() for name in stored}

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base: of its weight files, or of its tensors where there are none."""
        with step(LOG, "hashing the base"):
            return self.base.base_sha256

    @cached_property
    def base_record(self) -> dict[str, str]:
        """What an adapter's checkpoint says of its base: `name`, `sha256` and `task`."""
        source = self.base.source
        return {
            "name": source.pretrained.name if source.pretrained else source.describe,
            "sha256": self.base_sha256,
            "task": getattr(self.spec.base, "task", None) or "",
        }


def _insert(item: Pass) -> Insert[Any, Any] | None:
    """A pass that inserts a method, as such; None for any other."""
    return cast("Insert[Any, Any]", item) if isinstance(item, Insert) else None
