"""Passes with small options, graphs at each stage, and a pass of a user's own to derive others from."""

from __future__ import annotations

from typing import Any

from adaptc.ir.graph import Graph
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import Pass, run
from adaptc.weights import Held
from tests.families import Zoo, perturbed, small


def default(name: str, **options: Any) -> Any:
    """A pass with its default options; `nowhere` as the target of one that wants a target."""
    made: Any = load_passes()[name]
    if name.startswith("quantize-"):
        return made(**({"target": "nowhere"} | dict(made.body.small) | options))
    if name.startswith("insert-"):
        return made(**({"target": "nowhere"} | small(made.body.name) | options))
    return made(**options)


def at_stage(zoo: Zoo, stage: str, name: str = "mlp") -> Graph:
    """A graph at a stage, with a perturbed LoRA where it has adapters."""
    graph = zoo.graph(name)
    if stage == "traced":
        return graph
    graph = run(graph, [default("insert-lora", target="*", r=4)])
    graph.weights.update(
        {n: Held(v) for n, v in perturbed({n: graph.weights[n].load() for n in graph.adapter_names}).items()}
    )
    if stage in ("factored", "folded"):
        graph = run(graph, [default(stage.removesuffix("ed"))])
    return graph


def snapshot(graph: Graph) -> tuple[Any, ...]:
    return (
        graph.text(),
        graph.stage,
        dict(graph.weights),
        dict(graph.aliases),
        list(graph.adaptations),
        dict(graph.adapted_weights),
        [n for n, _ in graph.module.named_parameters()],
        [dict(node.meta) for node in graph.nodes],
    )


class Bad(Pass):
    """A pass of a user's own; `name` is set without registering it."""

    name = "bad"
