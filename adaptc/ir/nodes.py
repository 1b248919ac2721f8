"""Operations that share memory: in-place ones and views, as torch's schemas say."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_arg


def writes_in_place(target: Any) -> bool:
    """Whether an operation, such as `mul_`, writes to its first operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def memory_owner(node: fx.Node) -> fx.Node:
    """The node that made the memory of a value: behind views, and operations that gave back what they wrote to."""
    while node.op == "call_function" and _gives_operand(node.target):
        node = node_arg(node, 0)
    return node


def _gives_operand(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def operation(node: fx.Node) -> str:
    """The name of a node's operation, without namespace and overload: `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", str(node.target))


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
    argument = node.args[index]
    if not isinstance(argument, (list, tuple)):
        raise TypeError(f"argument {index} of %{node.name} is {argument!r}, not a list")
    return list(argument)


def map_operands(
    node: fx.Node, value_of: Callable[[fx.Node], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, a value in the place of every node, in lists too.

    Returns:
        the positional arguments, and those by keyword.
    """
    # Any: torch allows only what a graph can hold as a value, and this also gives tensors.
    return cast(Any, map_arg)((node.args, dict(node.kwargs)), value_of)


def apply_operation(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """What the operation of a node gives on these values of its operands."""
    args, kwargs = map_operands(node, value_of)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def keeps_shape(node: fx.Node) -> bool:
    """Whether a node's value has the shape of its first operand, symbols included: a slice that takes all."""
    before = node.args[0]
    return isinstance(before, fx.Node) and str(before.meta["val"].shape) == str(node.meta["val"].shape)


PROVENANCE = ("nn_module_stack", "stack_trace")
"""What a node's meta says of where it came from."""
VERIFIED = "verified"
"""The signature a node had when its value was last computed."""


def copy_nodes(nodes: fx.Graph) -> fx.Graph:
    """A deep copy of the nodes; recorded values are shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying its pytree specs
        return copy.deepcopy(nodes)


def signature(node: fx.Node) -> Any:
    """What a node's value depends on: its operation, and the recorded values of its operands."""
    operands = map_arg((node.args, dict(node.kwargs)), lambda operand: id(operand.meta.get("val")))
    return (node.target, repr(operands))


def set_tensor(module: nn.Module, name: str, value: torch.Tensor, persistent: bool = True) -> None:
    """Set a parameter or buffer under a dotted name, making plain containers on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Parameter):
        module._buffers.pop(leaf, None)
        module.register_parameter(leaf, value)
    else:
        module._parameters.pop(leaf, None)
        module.register_buffer(leaf, value, persistent=persistent)


def is_tensor(value: Any) -> bool:
    """Whether this is a node that gives a tensor, not a size or a flag."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter, buffer or constant under a dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_operand(node.args[0])}"
    shape = _shape(node.meta.get("val"))
    if node.op in ("placeholder", "get_attr"):
        kind = "input" if node.op == "placeholder" else "weight"
        return f"%{node.name} = {kind} {node.target}  {shape}".rstrip()
    target = (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )
    operands = [_operand(a) for a in node.args] + [f"{k}={_operand(v)}" for k, v in node.kwargs.items()]
    module = module_of(node)[0]
    note = ", ".join(word for word in (module, "a segment ends" if node.meta.get(CUT) else "") if word)
    return f"%{node.name} = {target}({', '.join(operands)})  {shape}" + (f"  # {note}" if note else "")


def _operand(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_operand(item) for item in value) + "]"
    return str(value)


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"


CUT = "cut"
"""The key in a node's meta that says that a segment ends there."""


def evaluated(node: fx.Node) -> Any:
    """What an operation gives on the recorded values of its operands; within the graph's own fake-tensor mode."""
    return apply_operation(node, _recorded)


def _recorded(node: fx.Node) -> Any:
    return False if node.target == "training" else node.meta["val"]


def module_of(node: fx.Node) -> tuple[str, str]:
    """The full name and class of the module a node came from; ("", "") at the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    name, cls = stack[-1]
    cls = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"@\d+", "", name), cls.rsplit(".", 1)[-1]


def source_of(node: fx.Node) -> str:
    """File and line, outside torch, that ran this node: `modeling_llama.py:214`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [(path, line) for path, line in frames if "/torch/" not in path] or frames
    return f"{outside[-1][0].rsplit('/', 1)[-1]}:{outside[-1][1]}" if outside else ""


def parameter_uses(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Every (get_attr node, user, argument index) of a graph; -1 for an argument inside a list or by keyword."""
    for node in graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                yield node, user, next((i for i, a in enumerate(user.args) if a is node), -1)


def follow_device(graph: fx.Graph, followed: fx.Node, after: fx.Node) -> None:
    """Let what is made on a constant device be made where a tensor is."""
    device: fx.Node | None = None
    for node in list(graph.nodes):
        constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)]
        if node.op != "call_function" or not constants:
            continue
        if device is None:
            with graph.inserting_after(after):
                device = graph.call_function(getattr, (followed, "device"))
            device.meta["val"] = followed.meta["val"].device
        found = device
        node.args = tuple(found if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {k: found if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
