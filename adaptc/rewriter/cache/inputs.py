"""The inputs of a decoder: which is of token ids, and which are read."""

from __future__ import annotations

from torch import fx

from adaptc.errors import Refusal
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import operation

IDS = ("decoder_input_ids", "input_ids")
"""What transformers calls the input of token ids."""


def token_ids(graph: Graph) -> fx.Node | Refusal:
    """The input of token ids: transformers' name, or the one input that an embedding reads."""
    nodes = {str(node.target): node for node in graph.placeholders}
    for name in IDS:
        if name in nodes:
            return nodes[name]
    read = {n for node in graph.nodes if "embedding" in operation(node) for n in node.all_input_nodes}
    ids = [node for node in nodes.values() if node in read and node.meta["val"].dim() == 2]
    if len(ids) == 1:
        return ids[0]
    names = ", ".join(str(node.target) for node in ids) or "no input of the shape (batch, tokens)"
    return Refusal(
        f"a cache is of tokens, and {names} is read by an embedding",
        notes=("call the input of the token ids input_ids",),
    )


def new_tokens(graph: Graph) -> str:
    """The name of the dimension of the tokens."""
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    spec = next(s for s, node in zip(graph.inputs, graph.placeholders, strict=True) if node is ids)
    return str(spec.dims[1])


def forget_unread(graph: Graph) -> None:
    """Forget the adaptations of which a graph reads no tensor any more."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    graph.adaptations = [
        adaptation
        for adaptation in graph.adaptations
        if any(name in read for name, _ in adaptation.params.values())
    ]


def drop_unread(graph: Graph) -> None:
    """Remove inputs that nothing reads."""
    pairs = list(zip(graph.placeholders, graph.inputs, strict=True))
    for node, _ in pairs:
        if not node.users:
            graph.module.graph.erase_node(node)
    graph.inputs = tuple(spec for node, spec in pairs if node.users)
