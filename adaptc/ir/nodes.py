"""Single nodes of a graph: their arguments, operation, memory, provenance and marks, and the tensors they name."""

# torch has no public way to ask for a module's own parameters and buffers and drop one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg

# Keys of a node's `meta`, which torch leaves to its users.

PROVENANCE = ("nn_module_stack", "stack_trace")
"""The keys under which torch keeps the module and the source lines that a node comes from."""
ADAPTATION = "adaptation"
"""The key of the adaptation whose expression a node is part of; a node of the base has none."""
VERIFIED = "verified"
"""The key of the `signature` that a node had when its value was last computed."""
REAL = "real"
"""The key, at a value for virtual and real tokens: the name of the input of the real tokens' ids, the name of the node
that has the value for the real tokens alone, and whether the virtual tokens are in front of them."""
CUT = "cut"
"""The key that marks the last node of a segment whose activations are computed again for the gradient."""


# Arguments


def node_arg(node: fx.Node, index: int) -> fx.Node:
    """The argument of a node at this position, which is a node.

    Raises:
        TypeError: the argument is a constant or a list.
    """
    argument = node.args[index]
    if not isinstance(argument, fx.Node):
        raise TypeError(f"argument {index} of %{node.name} is {argument!r}, not a node")
    return argument


def list_arg(node: fx.Node, index: int) -> list[Any]:
    """The argument of a node at this position, which is a list, as a new list.

    Raises:
        TypeError: the argument is a node or a constant.
    """
    argument: Any = node.args[index]
    if not isinstance(argument, (list, tuple)):
        raise TypeError(f"argument {index} of %{node.name} is {argument!r}, not a list")
    return list(cast(list[Any], argument))


def map_operands(
    node: fx.Node, value_of: Callable[[fx.Node], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with a value in the place of every node, inside lists too.

    Returns:
        the positional arguments, and the arguments by keyword.
    """
    # Any: torch.fx types this for what a graph can hold, and here a value may be a tensor.
    return cast(Any, map_arg)((node.args, dict(node.kwargs)), value_of)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of a registered operation by their names in its schema, with the defaults of those left out."""
    arguments: Any = cast(Any, node.target)._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return defaults | dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)


# Operations

RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})
"""Operations that give a value axes of these sizes, and keep the order of its entries."""


def is_operator(target: object) -> TypeGuard[OpOverload[..., Any]]:
    """Whether a node's target is a registered operation, such as `aten.mm.default`, and no Python function."""
    return isinstance(target, OpOverload)


def operation(node: fx.Node) -> str:
    """The name of a node's operation, without namespace and overload: `conv2d`."""
    if is_operator(node.target):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", str(node.target))


def apply_operation(node: fx.Node, value_of: Callable[[fx.Node], object]) -> Any:
    """What the operation of a node gives on these values of its operands."""
    args, kwargs = map_operands(node, value_of)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def evaluated(node: fx.Node) -> Any:
    """What an operation gives on the recorded values of its operands; within the graph's own fake-tensor mode."""
    return apply_operation(node, lambda n: False if n.target == "training" else n.meta["val"])


def signature(node: fx.Node) -> tuple[Any, str]:
    """What a node's value depends on: its operation, and the recorded values of its operands by their identities."""
    return node.target, repr(map_operands(node, lambda operand: id(operand.meta.get("val"))))


# Memory: operations that write in place and views, as torch's schemas declare them


def writes_in_place(target: object) -> bool:
    """Whether an operation, such as `mul_`, writes to its first operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def memory_owner(node: fx.Node) -> fx.Node:
    """The node that allocated the memory of a value: upstream of views, and of operations that return their operand."""
    while node.op == "call_function" and returns_operand(node.target):
        node = node_arg(node, 0)
    return node


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that an operation writes to, as its schema says."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    values = arguments_by_name(node)
    written = [
        values.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [value for value in written if isinstance(value, fx.Node)]


def same_memory(node: fx.Node) -> list[fx.Node]:
    """The users of a value that give the same memory: views of it, and items of a list of views."""
    return [user for user in node.users if user.args[:1] == (node,) and returns_operand(user.target)]


def returns_operand(target: object) -> bool:
    """Whether an operation gives the memory of its first operand: a view of it, or an item of a list of views."""
    if target is operator.getitem:  # of a list of views; of other lists it has memory of its own
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


# Values


def is_tensor(value: object) -> bool:
    """Whether this is a node that gives a tensor, not a size or a flag."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def keeps_shape(node: fx.Node) -> bool:
    """Whether a value has the shape of its node's first operand, symbols included, such as a slice that takes all."""
    operand = node.args[0]
    return isinstance(operand, fx.Node) and str(operand.meta["val"].shape) == str(node.meta["val"].shape)


def size_expression(size: object) -> Any:
    """A size of a recorded value as a `sympy` expression: an integer, or a formula in the sizes of the inputs."""
    return cast(Any, size).node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def traced_size(size: object) -> Any:
    """The number that a symbolic size had in the trace; anything else as it is."""
    return int(cast(Any, size).node.hint) if isinstance(size, torch.SymInt) else size


# Provenance


def module_of(node: fx.Node) -> tuple[str, str]:
    """The full name and the class of the module that a node comes from; `("", "")` at the root."""
    stack = cast(dict[str, tuple[str, Any]], node.meta.get("nn_module_stack") or {})
    if not stack:
        return "", ""
    name, cls = list(stack.values())[-1]
    class_name: str = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"@\d+", "", name), class_name.rsplit(".", 1)[-1]


def source_of(node: fx.Node) -> str:
    """File and line, outside torch, that ran this node: `modeling_llama.py:214`; "" if none is recorded."""
    frames: list[tuple[str, str]] = re.findall(
        r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""
    )
    outside = [(path, line) for path, line in frames if "/torch/" not in path] or frames
    return f"{outside[-1][0].rsplit('/', 1)[-1]}:{outside[-1][1]}" if outside else ""


def provenance(node: fx.Node) -> tuple[str, ...]:
    """The note of a message on where a node comes from: `in layers.0.attention, from modeling_llama.py:214`.

    Returns:
        one note; none if neither the module nor the source line is recorded.
    """
    module, source = module_of(node)[0], source_of(node)
    parts = [f"in {module}"] * bool(module) + [f"from {source}"] * bool(source)
    return (", ".join(parts),) if parts else ()


# What belongs to many nodes: a copy of all, the device they share, the tensors that they read by name


def copy_nodes(nodes: fx.Graph) -> fx.Graph:
    """A deep copy of the nodes; recorded values are shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying its pytree specs
        return copy.deepcopy(nodes)


def follow_device(graph: fx.Graph, followed: fx.Node, after: fx.Node) -> None:
    """Replace constant devices by the device of a tensor, so that a moved module allocates where it is.

    Args:
        graph: changed in place.
        followed: the tensor whose device is taken.
        after: the node that the operation which reads the device is inserted after; nothing is if there is no constant.
    """
    device: fx.Node | None = None
    for node in list(graph.nodes):
        constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)]
        if node.op != "call_function" or not constants:
            continue
        if device is None:
            with graph.inserting_after(after):
                device = graph.call_function(getattr, (followed, "device"))
            device.meta["val"] = followed.meta["val"].device
        read = device
        node.args = tuple(read if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {k: read if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter, buffer or constant under a dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def drop_tensor(module: nn.Module, name: str) -> None:
    """Drop the parameter or buffer under a dotted name, and the submodules that held nothing else."""
    *path, leaf = name.split(".")
    owners = [module]
    for part in path:
        owners.append(owners[-1].get_submodule(part))
    owners[-1]._parameters.pop(leaf, None)
    owners[-1]._buffers.pop(leaf, None)
    owners[-1]._non_persistent_buffers_set.discard(leaf)
    for part in reversed(path):
        left = owners.pop()
        if left._parameters or left._buffers or left._modules:
            return
        del owners[-1]._modules[part]


def set_tensor(module: nn.Module, name: str, value: torch.Tensor, persistent: bool = True) -> None:
    """Set a parameter or a buffer under a dotted name; submodules that are not there are created empty.

    Args:
        module: changed in place.
        name: such as `layers.0.weight`; what it named before, parameter or buffer, is replaced.
        value: an `nn.Parameter` becomes a parameter, any other tensor a buffer.
        persistent: whether a buffer is part of the state dict.
    """
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    # torch refuses to register a name that is already one of the other kind
    if isinstance(value, nn.Parameter):
        module._buffers.pop(leaf, None)
        module.register_parameter(leaf, value)
    else:
        module._parameters.pop(leaf, None)
        module.register_buffer(leaf, value, persistent=persistent)
