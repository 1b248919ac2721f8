"""A compiled program: the base, the adapted graph, and every graph that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from adaptc.checkpoints.compaction import compacted
from adaptc.checkpoints.graph_records import records_of
from adaptc.checkpoints.module_adapters import META
from adaptc.checkpoints.records import as_json
from adaptc.compiler.adapter_weights import load_checkpoints, put_weight
from adaptc.compiler.follow_training import FollowTraining
from adaptc.compiler.plan_report import PlanReport
from adaptc.compiler.proofs import Proofs, check_finite
from adaptc.compiler.quantization_error import QuantizationErrors, measure
from adaptc.compiler.rewrite import After, Rewritten
from adaptc.compiler.schedule import folds_into_bits, lowering
from adaptc.errors import ProofError, Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.ir.module import bind
from adaptc.ir.nodes import get_tensor
from adaptc.quantization.quantized_weight import QuantizedPart
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES, Pass, run
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import Spec
from adaptc.tracing.export import export, output_class
from adaptc.weights import Deferred, Held, sha256_of_files, sha256_of_tensors

RANDOM = "fold, random adapters"
"""The proof that no zero in an untrained adapter hides a mistake."""


@dataclass(frozen=True)
class Folded:
    """The adapted graph without its adapters, whose changes the weights have.

    Attributes:
        merged: right after the pass that folds.
        quantized: after the spec's passes behind it, where there are any.
        graph: what is written: `quantized` as it runs, or `merged` itself.
    """

    merged: Graph
    quantized: Graph | None
    graph: Graph


class Program:
    """The graphs of a compile. A method that makes one gives a new graph, with the adapters as they stand.

    Attributes:
        spec: the spec as resolved.
        plan: sites, budget and pipeline.
        base: the traced graph.
        graph: the adapted graph; its adapter weights follow the trainable module once that is made.
        factored: the adapted graph as it is run live, without weights of its own.
        records: what each pass did.
        proofs: what was proved so far.
    """

    def __init__(
        self, spec: Spec, plan: PlanReport, base: Graph, rewritten: Rewritten, after: After | None = None
    ):
        self.spec, self.plan, self.base, self.after = spec, plan, base, after
        self.graph, self.factored = rewritten.adapted, rewritten.factored
        self.records = list(rewritten.records)
        self.proofs = Proofs(base, spec.seed)
        load_checkpoints(spec, plan.entries, base, self.graph, lambda: self.base_sha256)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The trainable module: only the adaptation requires grad, and train()/eval() are followed.

        From then on the adapted graph has the adapters that the module has, and its buffers.

        Raises:
            ProofError: it computes something else than the adapted graph.
        """
        graph = self.trainable_graph()
        self._prove_trainable(graph)
        module = bind(graph, graph.adapter_names)
        module.meta[META] = self.about(graph)
        inserted = graph.inserted
        for name, param in inserted.items():
            if param.stored:
                put_weight(self.graph.weights[name], _follows(module, name))
        for name, buffer in module.named_buffers():  # what batch norm learns belongs to every artifact too
            if name not in inserted:
                self.graph.weights[name] = Deferred(tuple(buffer.shape), buffer.dtype, _follows(module, name))
        return module

    def reset(self) -> None:
        """Let what follows from the options be so again in the module, such as a mask that a training step drew."""
        with torch.no_grad():
            for name, param in self.graph.inserted.items():
                if not param.stored:
                    get_tensor(self.module, name).copy_(self.graph.weights[name].load())

    def about(self, graph: Graph) -> dict[str, Any]:
        """What a module made of a graph must know by itself: to save and load its adapters, and to be saved."""
        return {
            "inputs": [asdict(spec) for spec in graph.inputs],
            "outputs": list(graph.outputs),
            "output_class": output_class(graph.module),
            "names": {name: graph.aliases.get(name, name) for name in graph.weights},
            "buffers": sorted(graph.buffers),
            "transient": sorted(graph.transient),
            "trainable": graph.adapter_names,
            "adapters": as_json(records_of(graph)),
            "base": self.base_record,
        }

    def trainable_graph(self) -> Graph:
        """The factored graph in both modes."""
        graph = self._both_modes.copy()
        graph.weights.update(self.graph.weights)
        return graph

    @cached_property
    def _both_modes(self) -> Graph:
        """The factored graph that follows `training`: made once, since it needs a second trace of the model."""
        source, passes = self.base.source, list(self.plan.opening)
        if source.model is not None:
            passes.insert(0, FollowTraining(export(source.model, source.inputs, training=True)))
        return _lowered(run(self.base, passes))

    def live_graph(self, adapted: Graph | None = None) -> Graph:
        """The factored graph in evaluation mode, with the adapters of `adapted`, or as they stand."""
        graph = self.factored.copy()
        graph.weights.update((adapted or self.graph).weights)
        return graph

    def compact_graph(self) -> Graph:
        """The live graph, without what training has pruned."""
        records = records_of(self.graph)
        smaller, values = compacted(records, self.tensors())
        pruned = {
            (new.entry, new.method): new for old, new in zip(records, smaller, strict=True) if new is not old
        }
        if not pruned:
            return self.live_graph()
        passes: list[Pass] = []
        for item in self.plan.opening:
            new = pruned.get((item.entry, item.method.name)) if isinstance(item, Insert) else None
            passes.append(item if new is None else replace(item, method=new.instance))  # type: ignore[type-var]
        graph = self._with_bits(run(self.base, passes))
        for name, param in graph.inserted.items():
            if param.stored:
                graph.weights[name] = Held(values[name])
        return _lowered(graph)

    def bare_graph(self) -> Graph:
        """The model without adapters; quantized, if the spec asks for that."""
        quantizes = list(dict.fromkeys(item for item in self.plan.passes if isinstance(item, Quantize)))
        return _lowered(self._with_bits(run(self.base, quantizes)))

    def float_graph(self) -> Graph:
        """The model with its adapters, but for those that make up for quantization, and floats only."""
        floats = [item for item in self.plan.opening if not isinstance(item, Quantize)]
        return self._adapted_by([i for i in floats if not (isinstance(i, Insert) and i.method.compensates)])

    def bits_graph(self) -> Graph:
        """The adapted graph with the bits that it had before any pass made floats of them."""
        opening = self.plan.opening
        passes = [item for item in opening if not isinstance(item, PASSES["dequantize"])]
        return self.graph if len(passes) == len(opening) else self._adapted_by(passes)

    def _adapted_by(self, passes: Sequence[Pass]) -> Graph:
        """What these passes make of the base, with the adapters as they stand."""
        graph = run(self.base, passes)
        names = {name for name, param in self.graph.inserted.items() if param.stored}
        graph.weights.update({name: self.graph.weights[name] for name in names & graph.weights.keys()})
        return graph

    def _with_bits(self, graph: Graph) -> Graph:
        """The same graph with the bits that were found already, which passes that run again would find anew."""
        bits = {name: w for name, w in self.graph.weights.items() if isinstance(w, QuantizedPart)}
        graph.weights.update({name: bits[name] for name in bits.keys() & graph.weights.keys()})
        return graph

    def folded(self, floats: bool = False) -> Folded:
        """The folded graphs, not proved yet: see `prove_fold`.

        Args:
            floats: what is still in bits is floats then.

        Raises:
            RefusedError: a weight cannot be folded into, or the spec's own passes leave nothing to fold.
            ProofError: an adapter is not finite, or the folded graph has other operations than the base.
        """
        check_finite(self.graph)
        refusal = None if self.plan.closing else folds_into_bits(self.graph)
        if refusal:
            raise RefusedError([refusal])
        merged = self._merged(self.graph, record=True, floats=floats)
        if merged.adaptations and merged.stage != "folded":
            reason = f"`passes` leaves a graph that is {self.graph.stage}, which cannot be folded; leave `factor` out"
            raise RefusedError([Refusal(reason)])
        whole = not merged.adaptations and not any(a.stays for a in self.graph.adaptations)
        plain = self.spec.passes is None and not self.graph.quantized
        if plain and whole and merged.operations != self.base.operations:
            raise ProofError("the folded graph has other operations than the base")
        if not self.plan.closing[1:]:
            return Folded(merged, None, merged)
        quantized = run(merged, self.plan.closing[1:], self.records, self.after)
        return Folded(merged, quantized, _lowered(quantized))

    def _merged(self, graph: Graph, record: bool = False, floats: bool = False) -> Graph:
        """Fold a graph that is at a stage for it, as the spec's own passes do; of any other, a copy is given back."""
        fold = self.plan.closing[0] if self.plan.closing else PASSES["fold"]()
        if graph.stage not in fold.takes:
            return _lowered(graph) if graph.quantized else graph.copy()
        first = record and not any(done.name == fold.name for done in self.records)
        merged = run(graph, [fold], self.records if first else None, self.after if first else None)
        if not merged.quantized or self.plan.closing[1:]:
            return merged
        return run(merged, [PASSES["dequantize"]()] if floats else lowering(merged))

    def prove_trace(self) -> None:
        """The traced graph computes what the model does, where the model is there to run.

        Raises:
            TraceError: no two runs of the model itself agree.
            ProofError: they differ.
        """
        source = self.base.source
        if source.real and source.model is not None:
            self.proofs.trace(source.model)

    def _prove_trainable(self, graph: Graph) -> None:
        """The trainable graph computes what the inserted expressions say, with random adapters."""
        if not graph.adaptations:
            return
        random, reference = self.proofs.randomised(self.graph)
        factored = graph.copy()
        factored.weights.update({name: random.weights[name] for name in graph.adapter_names})
        candidate = self.proofs.run_like(reference, factored)
        self.proofs.prove("trainable module", random, reference, candidate)

    def prove_fold(self, folded: Folded) -> Run | None:
        """The merged graph computes what the live one does: with the adapters as they stand, and where these do not
        show with random ones too. Nothing is proved where nothing was merged and other passes follow.

        Returns:
            What the folded graph gave, where the merged graph is the one that is written.

        Raises:
            ProofError: it computes something else.
        """
        if folded.quantized is not None and not self.graph.adaptations:
            return None
        graph = self.live_graph()
        live = self.proofs.run(graph)
        merged = self.proofs.run_like(live, folded.merged)
        self.proofs.prove("fold", graph, live, merged)
        if self.graph.adaptations and not self.proofs.has(RANDOM) and not self.proofs.shows(live, self.graph):
            random, _ = self.proofs.randomised(self.graph)
            live = self.proofs.run(self.live_graph(random))
            self.proofs.prove(RANDOM, random, live, self.proofs.run_like(live, self._merged(random)))
        return merged if folded.graph is folded.merged else None

    def reference(self, graph: Graph, run: Run | None, wide: bool = False) -> Run:
        """What a graph gives, for an artifact to be held against.

        Args:
            graph: the graph.
            run: what it gave already with all in float32, if it has run; taken, unless it made choices that were not
                its own, or ran in other dtypes than asked for.
            wide: compute in float32 what the graph computes in float16 or bfloat16.
        """
        narrow = Interpreter(graph, wide=True).wide
        if run is not None and not run.flipped and (wide or not narrow):
            return run
        return Interpreter(graph, wide).on(self.proofs.batches)

    def quantization_errors(
        self, folded: Folded | None = None, rounding: Graph | None = None
    ) -> QuantizationErrors | None:
        """What quantization costs, against the float model with the same adapters; None where nothing is quantized.

        Args:
            folded: of these graphs, in place of the adapted one.
            rounding: the same with activations rounded as a program does, if one does.
        """
        last = folded.quantized if folded is not None else None
        candidate = last if last is not None and last.quantized else self.bits_graph()
        if not candidate.quantized:
            return None
        return measure(self.float_graph(), candidate, self.spec.seed, rounding)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapters' tensors as they stand, those that checkpoints hold."""
        stored = [name for name, param in self.graph.inserted.items() if param.stored]
        return {name: self.graph.weights[name].load() for name in stored}

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base: of its weight files, or of its tensors where there are none."""
        if self.base.source.files:
            return sha256_of_files(self.base.source.files)
        names = [n for n, first in self.base.aliases.items() if n == first]
        return sha256_of_tensors((name, self.base.weights[name]) for name in names)

    @property
    def base_record(self) -> dict[str, str]:
        """What a checkpoint of an adapter says of its base: `name`, `sha256`, `task`."""
        source = self.base.source
        return {
            "name": source.pretrained.name if source.pretrained else source.describe,
            "sha256": self.base_sha256,
            "task": getattr(self.spec.base, "task", None) or "",
        }


def _lowered(graph: Graph) -> Graph:
    """The graph as it is trained and run live."""
    return run(graph, lowering(graph))


def _follows(module: fx.GraphModule, name: str) -> Callable[[], torch.Tensor]:
    """What a module holds under a name whenever it is asked: `to` and `load_state_dict` may replace the tensor."""
    return lambda: get_tensor(module, name).detach()
