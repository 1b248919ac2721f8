"""The trainable module: the factored graph in both modes with its weights, which the adapted graph then follows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import fx

from adaptc.checkpoints.graph_records import records_of
from adaptc.checkpoints.module_adapters import MODEL
from adaptc.checkpoints.recorded_model import record_of
from adaptc.checkpoints.records import as_json
from adaptc.compiler.follow_training import FollowTraining
from adaptc.compiler.plan.adapter_weights import put_weight
from adaptc.compiler.proof.proofs import Proofs
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import get_tensor
from adaptc.progress.steps import step
from adaptc.rewriter.pipeline import run
from adaptc.tracing.export import export, output_class
from adaptc.tracing.huggingface.module import pretrained
from adaptc.weights import Deferred, Weight

LOG = logging.getLogger(__name__)


def base_of_both_modes(base: Graph) -> Graph:
    """The traced graph that reads the module's `training`; of a program without a model, in evaluation mode alone.

    Raises:
        TraceError: the model computes something else in training than dropout and the like.
    """
    source = base.source
    if source.model is None:
        return base
    with step(LOG, "tracing the model in training mode"):
        traced = export(source.model, source.inputs, training=True)
    return run(base, [FollowTraining(traced)])


def module_record(graph: Graph, base: dict[str, str]) -> dict[str, Any]:
    """What a module made of a graph must know to be saved, and to save and load its adapters, without the graph.

    Args:
        graph: the graph of the module.
        base: what a checkpoint says of the base.

    Returns:
        `inputs`, `outputs` and `output_class`; `names` (each tensor -> the first name of the same tensor),
        `buffers`, `transient` and `trainable` names; `adapters` as records, `heads`, whether it is `quantized`,
        `base`, and `model` where that is one of transformers.
    """
    model = pretrained(graph.source.model)
    return {
        "inputs": [spec.to_json() for spec in graph.inputs],
        "outputs": list(graph.outputs),
        "output_class": output_class(graph.module),
        "names": {name: graph.aliases.get(name, name) for name in graph.weights},
        "buffers": sorted(graph.buffers),
        "transient": sorted(graph.transient),
        "trainable": graph.adapter_names,
        "adapters": as_json(records_of(graph)),
        "heads": sorted(graph.output_heads),
        "quantized": bool(graph.quantized),
        "base": base,
        **({MODEL: record_of(model)} if model is not None else {}),
    }


def take_original_calls(
    module: fx.GraphModule,
    flatten: Callable[[tuple[object, ...], Mapping[str, object]], dict[str, torch.Tensor]] | None,
) -> None:
    """Let a module take calls as its author writes them too, with nested tensors; by the names of its inputs it does.

    Args:
        module: changed in place.
        flatten: from such a call to the inputs by name; None where they are the same.
    """
    if flatten is not None:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: ((), flatten(args, kwargs)), with_kwargs=True
        )


def trainable_title(name: str) -> str:
    """What the proof of an alternative's trainable graph is called."""
    return f"trainable module, {name}"


def prove_trainable(proofs: Proofs, adapted: Graph, trainable: Graph, name: str = "trainable module") -> None:
    """The trainable graph computes what the adapted one does, with random adapters.

    Args:
        proofs: where the proof is kept.
        adapted: the adapted graph.
        trainable: the trainable one.
        name: what is proved.

    Raises:
        ProofError: it computes something else.
    """
    if not trainable.adaptations:
        return

    def sides(random: Graph) -> tuple[Graph, Graph]:
        factored = trainable.copy()
        factored.weights.update({name: random.weights[name] for name in trainable.adapter_names})
        return random, factored

    proofs.with_random_adapters(name, adapted, sides)


def follow(adapted: Graph, module: fx.GraphModule) -> None:
    """Let the adapted graph have the adapters and buffers that a module has whenever they are read.

    A tensor that the module holds unchanged is read from where the module has it from, in its own dtype: a float32
    adapter on a bfloat16 base stays what its checkpoint says until it is trained.
    """
    inserted = adapted.inserted
    for name, param in inserted.items():
        if param.stored:
            put_weight(adapted.weights[name], following(module, name, copy(adapted.weights[name])).make)
    for name, _ in module.named_buffers():  # what batch norm learns belongs to every artifact too
        if name in adapted.weights and name not in inserted:
            adapted.weights[name] = following(module, name, adapted.weights[name])


def following(module: fx.GraphModule, name: str, stored: Weight) -> Deferred:
    """A weight that is read as stored while the module's tensor is no other; then it is the module's.

    Args:
        module: the module; `to` and `load_state_dict` may replace its tensor.
        name: of the tensor.
        stored: what the module's tensor was rounded from.
    """

    def read() -> torch.Tensor:
        tensor, exact = get_tensor(module, name).detach(), stored.exact()
        return exact if torch.equal(exact.to(tensor.device, tensor.dtype), tensor) else tensor

    return Deferred(stored.shape, stored.dtype, read)


def reset_derived(adapted: Graph, module: fx.GraphModule) -> None:
    """Give a module's adapters again what follows from the options, such as a mask that a training step drew anew."""
    with torch.no_grad():
        for name, param in adapted.inserted.items():
            if not param.stored:
                get_tensor(module, name).copy_(adapted.weights[name].load())
