"""How a module is called: any examples that its forward takes, as flat tensors by name."""

from __future__ import annotations

import copy
import inspect
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from adaptc.errors import InputError, TraceError
from adaptc.inputs import InputSpec
from adaptc.ir.drawn_values import values_of
from adaptc.tracing.containers import register_containers, step_of

BY_POSITION, BY_NAME = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})
"""Names that the code of a `torch.fx` module uses itself."""
Path = tuple[Any, ...]
"""Where a value is in the arguments of a call: the name of an argument, then keys and indices."""

Flatten = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, torch.Tensor]]
"""From the arguments of a call to its tensors by name."""


@dataclass(frozen=True)
class Called:
    """A module, and how it is called.

    Attributes:
        model: takes each tensor as an argument of its own; the module itself where it does so already.
        inputs: those tensors.
        examples: copies of them, by name.
        flatten: the arguments of a call of the original module -> those tensors by name; None where they are the same.
        notes: the arguments that are no tensors, and so are constants of the trace; for the user.
    """

    model: nn.Module
    inputs: tuple[InputSpec, ...]
    examples: Mapping[str, torch.Tensor]
    flatten: Flatten | None
    notes: tuple[str, ...]


def called(
    model: nn.Module, examples: Sequence[object] | Mapping[str, object], dynamic: Mapping[str, object] | None
) -> Called:
    """How a module is called with some examples.

    A tensor is named as its argument is. One inside a list, a tuple, a dict or a dataclass is named by its argument
    and its place, such as `batch_mask` or `images_0`; one of `**kwargs` by its keyword. Anything else, such as None, a
    number or a word, is a constant.

    Args:
        model: the module.
        examples: what its forward takes, by position or by name.
        dynamic: name of an input -> axis -> name of the dimension, such as `{"x": {0: "batch"}}`, or nested as the
            examples are; all other dimensions keep the example's size.

    Raises:
        TraceError: the examples do not fit `forward` or hold no tensor, or `dynamic` names no input or no axis.
    """
    arguments = _bound(model, examples)
    leaves = dict(_leaves(arguments))
    tensors = {path: value for path, value in leaves.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise TraceError(
            f"no tensor is among the example inputs of {type(model).__name__}", "expected at least one"
        )
    names = _names(model, tensors)
    axes = _axes(dynamic or {}, names, tensors, model)
    inputs = tuple(_input(names[path], value, axes.get(names[path], {})) for path, value in tensors.items())
    copies = {names[path]: value.detach().cpu().clone() for path, value in tensors.items()}
    fixed = {path: value for path, value in leaves.items() if path not in tensors}
    notes = [_constant(model, path, value) for path, value in fixed.items() if _tells(model, path, value)]
    if not fixed and all(_plain(model, path, names[path]) for path in tensors):
        return Called(model, inputs, copies, None, tuple(notes))
    flat = _with_flat_inputs(model, arguments, names)
    return Called(flat, inputs, copies, _flattening(model, names, fixed), tuple(notes))


def _bound(model: nn.Module, examples: Sequence[object] | Mapping[str, object]) -> dict[str, Any]:
    """The examples by the arguments of forward.

    Raises:
        TraceError: they do not fit.
    """
    signature = inspect.signature(model.forward)
    by_name = isinstance(examples, Mapping)
    try:
        return _arguments(signature, () if by_name else examples, examples if by_name else {})
    except TypeError as error:
        raise TraceError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None


def _arguments(
    signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """What a call gives for each argument by name, those of `**kwargs` among the others.

    Raises:
        TypeError: the call does not fit the signature.
    """
    rest = next((p.name for p in signature.parameters.values() if p.kind is BY_NAME), "")
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    return arguments | cast("dict[str, Any]", arguments.pop(rest, {}))


def _flattening(model: nn.Module, names: Mapping[Path, str], fixed: Mapping[Path, Any]) -> Flatten:
    """What turns a call as the original module takes it into tensors by name; one by these names stays as it is."""
    signature, title = inspect.signature(model.forward), type(model).__name__

    def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not args and set(kwargs) == set(names.values()):
            return dict(kwargs)
        tensors: dict[str, torch.Tensor] = {}
        for path, value in _leaves(_arguments(signature, args, kwargs)):
            if path in names:
                tensors[names[path]] = value
            elif path not in fixed or not _same(fixed[path], value):
                place = ".".join(map(str, path))
                traced = f"is {fixed[path]!r}" if path in fixed else "was left out"
                raise InputError(f"{place} of {title}.forward {traced} in the trace, got {value!r}")
        missing = [".".join(map(str, path)) for path, name in names.items() if name not in tensors]
        if missing:
            raise InputError(f"the call of {title} lacks {', '.join(missing)}, which the trace has")
        return tensors

    return flatten


def _leaves(arguments: Mapping[str, object]) -> Iterator[tuple[Path, Any]]:
    """Every value of the arguments that is no container, with its place."""
    for name, value in arguments.items():
        register_containers(value)
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            yield (name, *(step_of(step) for step in path)), leaf


def _parameter(model: nn.Module, name: str) -> inspect.Parameter | None:
    """The parameter of forward of this name; None for a name that only `**kwargs` takes."""
    return inspect.signature(model.forward).parameters.get(name)


def _plain(model: nn.Module, path: Path, name: str) -> bool:
    """Whether forward takes a tensor by the name that it has as an input."""
    parameter = _parameter(model, name)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return path == (name,) and parameter is not None and parameter.kind in by_name


def _names(model: nn.Module, tensors: Mapping[Path, torch.Tensor]) -> dict[Path, str]:
    """A name for every tensor: an identifier, and none twice."""
    names: dict[Path, str] = {}
    for path in sorted(tensors, key=len):  # arguments first: they have their names
        name = re.sub(r"\W", "_", "_".join(str(step) for step in path))
        while name in names.values() or name in RESERVED or keyword.iskeyword(name):
            name += "_"
        names[path] = name
    return {path: names[path] for path in tensors}


def _axes(
    dynamic: Mapping[str, Any],
    names: Mapping[Path, str],
    tensors: Mapping[Path, torch.Tensor],
    model: nn.Module,
) -> dict[str, dict[int, str]]:
    """Name of an input -> axis -> name of the dimension.

    Raises:
        TraceError: `dynamic` names something else.
    """
    by_name = {name: path for path, name in names.items()}
    axes: dict[str, dict[int, str]] = {}
    for path, named in _flattened(dynamic, by_name, names):
        name = names.get(path)
        if name is None:
            hint = _advice(model)
            wrong = ".".join(map(str, path))
            raise TraceError(f"dynamic names {wrong}, but the inputs are {', '.join(by_name)}", *hint)
        rank = tensors[path].dim()
        beyond = [axis for axis in named if not -rank <= axis < rank]
        if beyond:
            raise TraceError(f"dynamic names dimension {beyond[0]} of {name!r}, which has {rank}")
        axes[name] = {axis % rank: dim for axis, dim in named.items()}
    return axes


def _flattened(
    dynamic: Mapping[Any, Any], by_name: Mapping[str, Path], names: Mapping[Path, str], prefix: Path = ()
) -> Iterator[tuple[Path, dict[int, str]]]:
    """The places that `dynamic` names, whether by the names of the inputs or nested as the examples are."""
    for key, value in cast("dict[Any, Any]", dynamic).items():
        path = (*prefix, key) if prefix or key not in by_name else by_name[key]
        inside = any(other[: len(path)] == path for other in names if other != path)
        listed = isinstance(value, (list, tuple))
        named = (
            dict(enumerate(cast("Sequence[Any]", value))) if listed else cast("dict[Any, Any]", value or {})
        )
        if path in names or not inside:
            yield path, {int(axis): dim for axis, dim in named.items()}
        else:
            yield from _flattened({k: v for k, v in named.items() if v}, by_name, names, path)


def _advice(model: nn.Module) -> list[str]:
    """What to do where forward has no names for what it is given by position, as that of a wrapper has none."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is BY_POSITION for parameter in parameters):
        return []
    parts = [name for name, _ in model.named_children()]
    inner = f", or compile the module that it calls, its `{parts[0]}`" if len(parts) == 1 else ""
    return [
        f"{type(model).__name__}.forward takes *args, which have no names",
        f'hand the inputs in by name, such as example_inputs={{"x": x}}{inner}',
    ]


def _input(name: str, value: torch.Tensor, axes: Mapping[int, str]) -> InputSpec:
    """The input that an example tensor stands for."""
    dims = tuple(axes.get(index, size) for index, size in enumerate(value.shape))
    dtype = str(value.dtype).removeprefix("torch.")
    spec = InputSpec(name, dtype, dims)
    return replace(spec, example=tuple(value.shape), values=values_of(name, [value]))


def _tells(model: nn.Module, path: Path, value: object) -> bool:
    """Whether a constant differs from what forward takes where it is left out."""
    parameter = _parameter(model, path[0])
    return len(path) > 1 or parameter is None or not _same(parameter.default, value)


def _same(default: object, value: object) -> bool:
    return type(default) is type(value) and bool(default == value)


def _constant(model: nn.Module, path: Path, value: object) -> str:
    """The note about an argument that is no tensor."""
    return (
        f"{'.'.join(map(str, path))} of {type(model).__name__}.forward is {value!r} in every product: an argument that "
        "is no tensor is a constant of the trace"
    )


def _with_flat_inputs(model: nn.Module, arguments: Mapping[str, Any], names: Mapping[Path, str]) -> nn.Module:
    """A module with the same parts, whose forward takes every tensor by its name; the model itself is not changed."""
    flat = copy.copy(model)
    original: Any = model.forward
    bound = isinstance(original, MethodType) and original.__self__ is model
    forward: Callable[..., Any] = MethodType(original.__func__, flat) if bound else original
    parameters = inspect.signature(original).parameters

    def filled(argument: str, example: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        def value_at(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return tensors[names[(argument, *(step_of(step) for step in path))]]

        return pytree.tree_map_with_path(value_at, example)

    def call(**tensors: torch.Tensor) -> Any:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, example in arguments.items():
            value = filled(name, example, tensors)
            kind = parameters[name].kind if name in parameters else BY_NAME
            if kind is BY_POSITION:
                args.extend(value)
            elif kind in (BY_NAME, inspect.Parameter.KEYWORD_ONLY):
                kwargs[name] = value
            else:
                args.append(value)
        return forward(*args, **kwargs)

    taken = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names.values()]
    cast(Any, call).__signature__ = inspect.Signature(taken)
    flat.forward = call
    return flat
