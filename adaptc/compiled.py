"""A compiled model: the adapted graph, and every product made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from adaptc import adapters
from adaptc.checkpoint_weights import load_checkpoints, put_weight
from adaptc.emit.torch import META, load_adapter_into
from adaptc.errors import ProofError, Refusal, RefusedError
from adaptc.expression import Folded
from adaptc.graph import Graph, attribute, bind
from adaptc.insert import Insert
from adaptc.layer_errors import QuantizationErrors, measure
from adaptc.method import options_of
from adaptc.orders import folds_into_bits, lowering
from adaptc.pipeline import Pass, PassRecord, run
from adaptc.plan import Plan
from adaptc.proof import Proof, Runner, check_weights, effect, gradients, prove, randomised, tolerance
from adaptc.registry import load_passes
from adaptc.spec import Spec
from adaptc.streaming import Chooser, Streamed
from adaptc.tracing.export import export, output_class
from adaptc.training_graph import FollowTraining
from adaptc.variants import bits_graph, float_graph, with_bits
from adaptc.weights import Computed, Held, Weight, sha256_of_files, sha256_of_tensors

RANDOM = "fold, random adapters"
"""The proof that no zero in an untrained adapter hides a mistake."""


class Compiled:
    """What `adaptc.compile` gives back.

    Attributes:
        spec: the spec as resolved.
        plan: sites, budget and pipeline.
        base: the traced graph.
        graph: the adapted graph; its adapter weights follow `module` once that is made.
        proofs: what was proved so far.
        errors: what quantization costs, as measured last.
        records: what each pass did.
    """

    def __init__(self, spec: Spec, plan: Plan, base: Graph, records: list[PassRecord], after: Any = None):
        self.spec, self.plan, self.base, self.records = spec, plan, base, records
        self.graph = plan.adapted
        self.proofs: list[Proof] = []
        self._after = after
        self._folded: Streamed | None = None
        self._quantized: Graph | None = None
        self.errors: QuantizationErrors | None = None
        load_checkpoints(self)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The trainable module: only the adaptation requires grad, and train()/eval() are followed."""
        graph = self.trainable_graph()
        self._prove_module(graph)
        module = bind(graph, graph.adapter_names)
        module.meta[META] = self.about(graph)
        inserted = graph.inserted
        for name, param in inserted.items():
            if param.stored:
                put_weight(self.graph.weights[name], _follows(module, name))
        for name, buffer in module.named_buffers():  # what batch norm learns belongs to every product too
            if name not in inserted:
                self.graph.weights[name] = Computed(tuple(buffer.shape), buffer.dtype, _follows(module, name))
        return module

    def reset(self) -> None:
        """Let what follows from the options be so again in the module, such as a mask that a training step drew."""
        with torch.no_grad():
            for name, param in self.graph.inserted.items():
                if not param.stored:
                    attribute(self.module, name).copy_(self.graph.weights[name].load())

    def trainable_graph(self) -> Graph:
        """The factored graph in both modes; adapters as they stand."""
        graph = self._both_modes.copy()
        graph.weights.update(self.graph.weights)
        return graph

    @cached_property
    def _both_modes(self) -> Graph:
        """The factored graph that follows `training`: made once, since it needs a second trace of the model."""
        model, passes = self.base.base.model, list(self.plan.opening)
        if model is not None:
            passes.insert(0, FollowTraining(export(model, self.base.base.inputs, training=True)))
        return _lowered(run(self.base, passes))

    def live_graph(self, adapted: Graph | None = None) -> Graph:
        """The factored graph in evaluation mode, with the adapters of `adapted`, or as they stand."""
        graph = self.plan.factored.copy()
        graph.weights.update((adapted or self.graph).weights)
        return graph

    def compact_graph(self) -> Graph:
        """The live graph, without what training has pruned."""
        records = adapters.records_of(self.graph)
        smaller, values = adapters.compacted(records, tensors_of(self))
        left = {
            (new.entry, new.method): new for old, new in zip(records, smaller, strict=True) if new is not old
        }
        if not left:
            return self.live_graph()
        passes: list[Pass] = []
        for item in self.plan.opening:
            new = left.get((item.entry, item.method.name)) if isinstance(item, Insert) else None
            passes.append(item if new is None else replace(item, **options_of(new.instance)))  # type: ignore[type-var]
        graph = with_bits(self, run(self.base, passes))
        for name, param in graph.inserted.items():
            if param.stored:
                graph.weights[name] = Held(values[name])
        return _lowered(graph)

    def folded_graph(self, keep: Callable[[Graph], Any] | None = None, floats: bool = False) -> Graph:
        """The folded graph, proved against the live one: as the adapters stand, or where they do not show, with
        random ones too.

        Args:
            keep: given the graph before it is proved; it may put its weights in a file and let the graph read them
                from there, so that what is proved is what was written and no weight is folded twice.
            floats: what is still in bits is floats then.

        Raises:
            RefusedError: a weight cannot be folded into, or the spec's own passes leave nothing to fold.
            ProofError: the folded graph has other operations than the base, or computes something else.
        """
        self.check_finite()
        self._quantized = None
        refusal = None if self.plan.closing else folds_into_bits(self.graph)
        if refusal:
            raise RefusedError([refusal])
        folded = self._fold(self.graph, record=True, floats=floats)
        if folded.adaptations and folded.stage != "folded":
            reason = f"`passes` leaves a graph that is {self.graph.stage}, which cannot be folded; leave `factor` out"
            raise RefusedError([Refusal(reason)])
        gone = not folded.adaptations and not any(a.stays for a in self.graph.adaptations)
        plain = self.spec.passes is None and not self.graph.quantized
        if plain and gone and folded.operations != self.base.operations:
            raise ProofError("the folded graph has other operations than the base")
        behind = self.plan.closing[1:]
        if keep is not None and not behind:
            keep(folded)
        if self.graph.adaptations or not behind:
            self._prove_fold(folded)
        if not behind:
            return folded
        self._quantized = run(folded, behind, self.records, self._after)
        final = run(self._quantized, lowering(self._quantized))
        if keep is not None:
            keep(final)
        self._folded = None
        return final

    def quantization_errors(
        self, adapters: str = "live", rounding: Graph | None = None
    ) -> QuantizationErrors | None:
        """What quantization costs, against the float model with the same adapters; None where nothing is quantized.

        Args:
            adapters: of the model as it is `live`, or `folded` by the spec's own passes.
            rounding: the same with activations rounded as a program does, if one does.
        """
        if adapters == "none":
            return None
        behind = adapters == "folded" and bool(self.plan.closing[1:])
        if behind and self._quantized is None:
            self.folded_graph()
        last = self._quantized if behind else None
        candidate = last if last is not None and last.quantized else bits_graph(self)
        if not candidate.quantized:
            return None
        self.errors = measure(float_graph(self), candidate, self.spec.seed, rounding)
        return self.errors

    def _prove_fold(self, folded: Graph) -> None:
        live = Streamed(self.live_graph(), wide=True)
        candidate = self.held_against(live, folded)
        self.prove("fold", live.graph, live, candidate)
        proved = any(proof.name == RANDOM for proof in self.proofs)
        if self.graph.adaptations and not proved and not self._visible(live):
            random = self._random()
            adapted = Streamed(self.live_graph(random), wide=True)
            self.prove(RANDOM, random, adapted, self.held_against(adapted, self._fold(random)))
        self._folded = candidate

    def streamed(self, graph: Graph, wide: bool = False) -> Streamed:
        """A runner of a graph; of the last folded graph the one that was proved, which knows what it gave, unless it
        made choices that were not its own.
        """
        made, known = Streamed(graph, wide), self._folded
        if known is None or known.turned or known.graph is not graph or known.wide != made.wide:
            return made
        return known

    def fold(self) -> fx.GraphModule:
        """A module with the base's operations and names, and no adaptation left.

        Raises:
            RefusedError: a tensor that would be folded into is used elsewhere too.
            ProofError: the folded module computes something else.
        """
        module = bind(self.folded_graph())
        module.meta[META] = self.about(self.base)
        return module.eval()

    def inference(self, tokens: int = 1, device: str = "cpu") -> fx.GraphModule:
        """The folded module with kernels that read quantized weights as they are stored, where faster ones exist.

        Args:
            tokens: rows of a product at a time: one where a model generates for one reader.
            device: where it will run, such as "cuda"; it is proved there.

        Raises:
            RefusedError: it cannot be folded as the spec stands, or torch does not reach the device.
            ProofError: the kernels compute something else.
        """
        from adaptc.emit.inference import inference_module

        return inference_module(self, tokens, device)

    def check_finite(self) -> None:
        """No adapter holds NaN or infinity.

        Raises:
            ProofError: names the first that does.
        """
        for name in self.graph.adapter_names:
            if not torch.isfinite(self.graph.weights[name].load()).all():
                raise ProofError(f"{name} holds NaN or infinity: the training diverged")

    def check_gradients(self) -> None:
        """Every trained parameter gets a gradient, and nothing else does.

        Raises:
            ProofError: names what does not.
        """
        self.check_finite()
        graph = randomised(self.trainable_graph())
        gradients(bind(graph, graph.adapter_names), graph, graph.adapter_names)

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapters as PEFT checkpoints."""
        from adaptc.emit.products import emit_one

        emit_one(self, {"format": "peft", "path": str(directory)})

    def load_adapter(self, directory: str | Path) -> None:
        """Replace the adapters' weights by those of a checkpoint.

        Raises:
            WeightError: it does not fit what was inserted.
        """
        load_adapter_into(self.module, Path(directory))

    def emit(self, format: str, path: str | Path, **options: Any) -> None:
        """Write one product, as an `emit` entry of a spec would: `emit("onnx", path, adapters="folded")`.

        Raises:
            SpecError: the format or an option is unknown.
            AdaptcError: it cannot be made, or its proof failed; nothing is left at `path`.
        """
        from adaptc.emit.products import emit_one

        emit_one(self, {"format": format, "path": str(path), **options})

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base: of its weight files, or of its tensors where there are none."""
        if self.base.base.files:
            return sha256_of_files(self.base.base.files)
        names = [n for n, first in self.base.aliases.items() if n == first]
        return sha256_of_tensors((name, self.base.weights[name]) for name in names)

    @property
    def origin(self) -> dict[str, str]:
        """What a checkpoint of an adapter says of its base."""
        task = getattr(self.spec.base, "task", None) or ""
        known = self.base.base.pretrained
        return {
            "name": known.name if known else self.base.base.describe,
            "sha256": self.base_sha256,
            "task": task,
        }

    def about(self, graph: Graph) -> dict[str, Any]:
        """What a module by itself must know: to save and load its adapters, and to be saved."""
        return {
            "inputs": [asdict(spec) for spec in graph.inputs],
            "outputs": list(graph.outputs),
            "output_class": output_class(graph.module),
            "names": {name: graph.aliases.get(name, name) for name in graph.weights},
            "buffers": sorted(graph.buffers),
            "transient": sorted(graph.transient),
            "trainable": graph.adapter_names,
            "adapters": adapters.as_json(adapters.records_of(graph)),
            "base": self.origin,
        }

    def rounding(self, folded: Mapping[str, Weight]) -> dict[str, float]:
        """What rounding to the storage dtype cost each folded weight, relative to its largest value."""
        return {
            name: w.rounding for name, w in folded.items() if isinstance(w, Folded) and w.rounding is not None
        }

    def prove(
        self, name: str, graph: Graph, reference: Runner, candidate: Runner, allowed: float | None = None
    ) -> Proof:
        """Hold two sides against one another and keep the proof; an earlier one of this name is replaced.

        Args:
            name: what is proved.
            graph: its inputs, and the dtype that says what error is tolerated.
            reference: one side.
            candidate: the other.
            allowed: what is tolerated, if not that.

        Raises:
            ProofError: they differ.
            WeightError: the base holds a weight that is no number.
        """
        allowed = tolerance(graph) if allowed is None else allowed
        try:
            proof = prove(name, graph.inputs, reference, candidate, allowed, seed=self.spec.seed)
        except ProofError:
            check_weights(self.base)
            raise
        self.proofs = [p for p in self.proofs if p.name != name] + [proof]
        return proof

    def _fold(self, graph: Graph, record: bool = False, floats: bool = False) -> Graph:
        """Fold a graph that is at a stage for it, as the spec's own passes do; of any other, a copy is given back."""
        fold = self.plan.closing[0] if self.plan.closing else load_passes()["fold"]()
        if graph.stage not in fold.takes:
            return run(graph, lowering(graph)) if graph.quantized else graph.copy()
        first = record and not any(done.name == fold.name for done in self.records)
        folded = run(graph, [fold], self.records if first else None, self._after if first else None)
        if not folded.quantized or self.plan.closing[1:]:
            return folded
        return run(folded, [load_passes()["dequantize"]()] if floats else lowering(folded))

    def _prove_module(self, graph: Graph) -> None:
        """The trainable module computes what the inserted expressions say, with random adapters."""
        if not graph.adaptations:
            return
        random = self._random()
        factored = graph.copy()
        factored.weights.update({name: random.weights[name] for name in graph.adapter_names})
        reference = Streamed(random, wide=True)
        self.prove("trainable module", random, reference, self.held_against(reference, factored))

    def held_against(self, other: Chooser, graph: Graph) -> Streamed:
        """A runner of a graph that makes the other side's choices between near equals."""
        return Streamed(graph, wide=True, follows=other, near=tolerance(graph))

    def _random(self) -> Graph:
        """The adapted graph with random adapters, whose effect a proof could not miss."""
        base = Streamed(self.base)
        for strength in (1.0, 8.0, 64.0):
            graph = randomised(self.graph, self.spec.seed, strength)
            if self._visible(Streamed(graph), base):
                break
        return graph

    def _visible(self, adapted: Streamed, base: Streamed | None = None) -> bool:
        """Whether the adapters change the base's outputs so much that no proof could miss it."""
        found = effect(self.base.inputs, base or Streamed(self.base, adapted.wide), adapted, self.spec.seed)
        return found > 10 * tolerance(self.graph)


def _lowered(graph: Graph) -> Graph:
    """The graph as it is trained and run live."""
    return run(graph, lowering(graph))


def _follows(module: fx.GraphModule, name: str) -> Callable[[], torch.Tensor]:
    """What a module holds under a name whenever it is asked: `to` and `load_state_dict` may replace the tensor."""
    return lambda: attribute(module, name).detach()


def tensors_of(compiled: Compiled) -> dict[str, torch.Tensor]:
    """The adapters' tensors as they stand."""
    graph = compiled.graph
    return {name: graph.weights[name].load() for name, param in graph.inserted.items() if param.stored}
