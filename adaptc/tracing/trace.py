"""Trace a base into a graph: one export, fake weights, and the sites that can be adapted."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from adaptc.checkpoints.huggingface_weights import first_names
from adaptc.errors import InputError, TraceError, WeightError
from adaptc.inputs import EXAMPLE, InputSpec
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.sites import find_sites
from adaptc.ir.base import Base
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import (
    VERIFIED,
    get_tensor,
    is_operator,
    operation,
    provenance,
    set_tensor,
    signature,
)
from adaptc.ir.stages import STAGE_TABLE
from adaptc.tracing.control_flow import ADVICE
from adaptc.tracing.export import CHANGED, export, output_names
from adaptc.weights import Deferred, Held, Weight

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32)
"""The dtypes of indices."""


def trace_base(base: Base) -> Graph:
    """Trace a base in evaluation mode. No weight is read.

    Raises:
        InputError: the inputs are not those of `forward`, or the model does not use one of them.
        TraceError: torch.export refused the model.
    """
    traced = base.program if base.model is None else export(base.model, base.inputs)
    assert traced is not None
    base.notes += [note for note in traced.meta.get(CHANGED, ()) if note not in base.notes]
    owner: nn.Module = traced if base.model is None else base.model
    aliases = first_names(owner)
    buffers = {name for name, _ in owner.named_buffers(remove_duplicate=False)}
    persistent = set(owner.state_dict(keep_vars=True))
    weights: dict[str, Weight] = {
        name: base.packed.get(name) or _deferred(base, name, get_tensor(owner, name)) for name in aliases
    }
    _check_operations(traced.graph.nodes)
    constants = _constants(traced, weights)
    weights |= constants
    aliases |= {name: name for name in constants}
    buffers |= constants.keys()
    module = _with_fake_weights(traced, weights, buffers)
    graph = Graph(
        module=module,
        weights=weights,
        aliases=aliases,
        buffers=frozenset(buffers),
        transient=frozenset(buffers - persistent),
        inputs=_inputs(base, traced),
        outputs=output_names(traced),
        sites=tuple(find_sites(traced.graph, aliases, set(aliases) - buffers)),
        heads=base.heads,
        source=base,
        examples={EXAMPLE: base.examples} if base.examples else {},
    )
    for node in graph.nodes:  # torch.export has just computed these values
        if "val" in node.meta:
            node.meta[VERIFIED] = signature(node)
    graph.clean()
    return graph


def _constants(traced: fx.GraphModule, weights: Mapping[str, Weight]) -> dict[str, Held]:
    """The tensors that the trace made of the author's plain values: those that its nodes read and no weight is.

    Raises:
        TraceError: one is no tensor, or has no value.
    """
    constants: dict[str, Held] = {}
    for node in traced.graph.nodes:
        if node.op != "get_attr" or node.target in weights or node.target == "training":
            continue
        tensor = get_tensor(traced, str(node.target))
        if not isinstance(cast(object, tensor), torch.Tensor):
            raise _no_tensor(tensor, next(iter(node.users)))
        if isinstance(tensor, FakeTensor):
            raise TraceError(f"the trace holds a constant without a value: {node.target}")
        constants[str(node.target)] = Held(tensor)
        node.meta["constant"] = tensor
    return constants


def _with_fake_weights(
    traced: fx.GraphModule, weights: Mapping[str, Weight], buffers: Container[str]
) -> fx.GraphModule:
    """The traced graph in a module whose weights are fake, in the fake mode of the trace."""
    mode = next(n.meta["val"].fake_mode for n in traced.graph.nodes if n.op == "placeholder")
    module = fx.GraphModule(nn.Module(), fx.Graph())
    with mode:
        for name, weight in weights.items():
            fake = torch.empty(weight.shape, dtype=weight.dtype)
            set_tensor(module, name, fake if name in buffers else nn.Parameter(fake, requires_grad=False))
            for node in traced.graph.find_nodes(op="get_attr", target=name):
                node.meta["val"] = fake
    module.graph = traced.graph
    return module


def _no_tensor(value: object, user: fx.Node) -> TraceError:
    """The error for a constant of a trace that is no tensor: a generator of random numbers, or a branch."""
    advice = {
        torch.Generator: "draw random numbers before the model is called, and hand them in as an input",
    }
    remedy = next((text for cls, text in advice.items() if isinstance(value, cls)), "leave it out of forward")
    return TraceError(
        f"the trace holds a {type(value).__name__}, which {operation(user)} takes; a graph holds tensors only",
        *provenance(user),
        remedy,
    )


def _check_operations(nodes: Iterable[fx.Node]) -> None:
    """Check that every node is an operation on tensors or sizes.

    Raises:
        TraceError: names the author's line of one that is not, such as `torch.vmap` leaves behind.
    """
    legal = STAGE_TABLE["traced"].functions
    for node in nodes:
        if node.op == "call_function" and not is_operator(node.target) and node.target not in legal:
            transform = "write it without torch.vmap and the transforms of torch.func, on the whole batch"
            raise TraceError(
                f"the trace holds {operation(node)}, which is no operation on tensors",
                *provenance(node),
                ADVICE.get(node.target, transform),
            )


def _deferred(base: Base, name: str, fake: torch.Tensor) -> Deferred:
    """A weight of the base, which finds the base's weights the first time one is asked for."""
    shape = tuple(fake.shape)

    def load() -> torch.Tensor:
        weight = base.bound.weights[name]
        if weight.shape != shape:
            raise WeightError(
                f"{name} has shape {list(weight.shape)}, but the traced model has {list(shape)}"
            )
        return weight.load()

    return Deferred(shape, fake.dtype, load)


def _inputs(base: Base, traced: fx.GraphModule) -> tuple[InputSpec, ...]:
    """The inputs in the order of the model's own signature; those of integers with their upper bound.

    Raises:
        InputError: the inputs named are not the model's, or it does not use one of them.
    """
    specs = {spec.name: spec for spec in base.inputs}
    nodes = {str(n.target): n for n in traced.graph.nodes if n.op == "placeholder"}
    if set(specs) != set(nodes):
        raise InputError(f"the model takes {', '.join(nodes)}, but the inputs are {', '.join(specs)}")
    unused = [name for name, node in nodes.items() if not node.users]
    if unused:
        raise InputError(
            f"the model does not use {', '.join(unused)}: take the input out, or check that the names fit forward"
        )
    return tuple(_bounded(specs[name], node) for name, node in nodes.items())


def _bounded(spec: InputSpec, node: fx.Node) -> InputSpec:
    if spec.dtype not in ("int64", "int32"):
        return spec
    bounds = [bound for bound in (_upper_bound(node), spec.high) if bound]
    return replace(spec, high=min(bounds, default=None))


def _upper_bound(node: fx.Node) -> int | None:
    """The rows of the smallest table that an integer input indexes; None where it indexes none."""

    def integers(node: fx.Node) -> list[fx.Node]:
        users = [user for user in node.users if user.op == "call_function" and not _selects(user, node)]
        values = [(user, user.meta.get("val")) for user in users]
        return [user for user, value in values if isinstance(value, torch.Tensor) and value.dtype in INTEGERS]

    bounds = [_choices(user, value) for value in walk([node], integers) for user in value.users]
    return min((bound for bound in bounds if bound is not None), default=None)


def _selects(user: fx.Node, value: fx.Node) -> bool:
    """Whether a value only selects among other values in an operation, so that it is no part of the result."""
    gathers = user.target is aten.gather.default and user.args[2] is value
    return gathers or _choices(user, value) is not None


def _choices(user: fx.Node, value: fx.Node) -> int | None:
    """The number of rows or classes that an operation selects from by a value; None where it does not select by it."""
    axis = cast(dict[Any, int], {aten.embedding.default: 0, aten.cross_entropy_loss.default: 1}).get(
        user.target
    )
    if axis is None or user.args[1] is not value:
        return None
    return int(cast(fx.Node, user.args[0]).meta["val"].shape[axis])
