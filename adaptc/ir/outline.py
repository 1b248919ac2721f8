"""The outline of a graph: its modules with their operations before and after a rewrite, and what flows between them."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, is_operator, module_of


def outline(before: Graph, after: Graph) -> dict[str, Any]:
    """The modules of two graphs of one model.

    Args:
        before: the traced base.
        after: the same graph, adapted and quantized.

    Returns:
        `modules`: path -> `type`, and the operations of the module itself, without its parts: name -> count, `before`,
        `after`, and `added` by an adapter; those that are equal are left out. `flows`: pairs of the modules' numbers,
        in which the second reads what the first computes.
    """
    modules: dict[str, dict[str, Any]] = {}
    for key, graph in (("before", before), ("after", after)):
        for node in graph.nodes:
            if not _is_step(node):
                continue
            path, kind = module_of(node)
            counts = modules.setdefault(path, {"type": kind.rsplit(".", 1)[-1]})
            name = _name(node)
            step = "added" if key == "after" and ADAPTATION in node.meta else key
            counts.setdefault(step, Counter[str]())[name] += 1
    for row in modules.values():
        if row.get("after") == row.get("before"):
            row.pop("after", None)
    numbers = {path: number for number, path in enumerate(modules)}
    return {
        "modules": {path: {k: _plain(v) for k, v in row.items()} for path, row in modules.items()},
        "flows": sorted(_flows(before, numbers)),
    }


def _flows(graph: Graph, numbers: dict[str, int]) -> set[tuple[int, int]]:
    """Which module reads what another one computes, by their numbers."""
    steps = [node for node in graph.nodes if _is_step(node)]
    return {
        (numbers[module_of(source)[0]], numbers[module_of(node)[0]])
        for node in steps
        for source in node.all_input_nodes
        if _is_step(source) and module_of(source)[0] != module_of(node)[0]
    }


def _is_step(node: fx.Node) -> bool:
    """Whether a node computes a tensor."""
    value = node.meta.get("val")
    return node.op == "call_function" and is_operator(node.target) and hasattr(value, "dtype")


def _name(node: fx.Node) -> str:
    """The name of a node's operation, without its overload: `linear`."""
    return str(node.target).split(".")[-2]


def _plain(value: object) -> object:
    return dict(cast(Counter[str], value)) if isinstance(value, Counter) else value
