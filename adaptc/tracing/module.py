"""Bases that are modules: given in Python, made by a factory, or saved as a `torch.export` program."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.ir.base import Base, Bound
from adaptc.ir.training_mode import mark_training_arguments
from adaptc.tracing.calls import called
from adaptc.tracing.constants import base_with_constants, constant_note
from adaptc.tracing.export import normalise
from adaptc.tracing.huggingface.module import is_pretrained, set_copy, with_chosen_inputs
from adaptc.tracing.saved_program import load_program
from adaptc.tracing.wrappers import unwrapped
from adaptc.weights import Held, Weight


def held_weights(module: nn.Module) -> dict[str, Weight]:
    """Every parameter and buffer of a module by name, aliases included; the tensors are shared, not copied."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: Held(tensor) for name, tensor in (*parameters, *buffers)}


def from_module(model: nn.Module, inputs: Sequence[InputSpec], describe: str = "") -> Base:
    """The base that is a module in memory, without wrappers; a model of transformers is set for the trace.

    Args:
        model: the module.
        inputs: the inputs of its `forward`; those of a model of transformers are derived where there are none.
        describe: where it comes from, for people; its class if left out.

    Raises:
        TraceError: the model does not hold its weights, or its inputs cannot be derived.
    """
    inner, notes = _prepared(model)
    base = _held(inner, inputs, notes)
    return replace(base, describe=describe or base.describe)


def _prepared(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A module without wrappers, and set for the trace if it is one of transformers; a note for each change."""
    inner, wrappers = unwrapped(model)
    inner, settings = set_copy(inner)
    return inner, [*wrappers, *settings]


def _held(model: nn.Module, inputs: Sequence[InputSpec], notes: Sequence[str]) -> Base:
    """The base of a module that is prepared."""
    base = Base(
        describe=f"{type(model).__module__}.{type(model).__qualname__}",
        model=model,
        inputs=tuple(spec for spec in inputs if spec.constant is None),
        find=lambda: Bound(held_weights(model)),
        real=True,
        notes=list(notes),
    )
    if is_pretrained(model):
        return with_chosen_inputs(base, inputs)
    constants = tuple(spec for spec in inputs if spec.constant is not None)
    return base_with_constants(base, constants, notes=map(constant_note, constants))


def from_factory(
    name: str, args: Mapping[str, object], inputs: Sequence[InputSpec], dtype: str | None
) -> Base:
    """The base that a factory returns.

    Args:
        name: the factory, as `package.module:factory`.
        args: its keyword arguments.
        inputs: the inputs of the module's `forward`.
        dtype: torch's name of the dtype that the module is cast to; its own if None.

    Raises:
        TraceError: the factory cannot be imported, fails, or returns no module.
    """
    module_name, _, attribute = name.partition(":")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        model = factory(**args)
    except Exception as error:
        raise TraceError(
            f"{name} failed: {type(error).__name__}: {error}",
            "expected an importable 'package.module:factory' that takes base.args and returns a torch.nn.Module",
        ) from error
    if not isinstance(model, nn.Module):
        raise TraceError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    return from_module(model, inputs, describe=name)


def from_program(path: Path, inputs: Sequence[InputSpec]) -> Base:
    """The base that is a program saved by `torch.export.save`.

    Args:
        path: the file.
        inputs: the inputs as specified; those of the program if there are none.

    Raises:
        TraceError: the file is missing, or a constant is among the inputs: a program was traced with its own.
        WeightError: it is broken, or holds more than a graph and tensors.
    """
    constant = next((spec for spec in inputs if spec.constant is not None), None)
    if constant is not None:
        raise TraceError(
            f"{constant.name} is {constant} in `inputs`, and a saved program takes no new constants",
            "export the program again with that value, or state the dtype and dimensions of the input",
        )
    if not path.is_file():
        raise TraceError(f"{path}: no such file; expected a program saved by torch.export.save")
    program = load_program(path)
    graph_module = normalise(program.module(check_guards=False))
    mark_training_arguments(graph_module.graph)
    graph_module.recompile()
    return Base(
        describe=str(path),
        model=None,
        program=graph_module,
        inputs=tuple(inputs or _program_inputs(graph_module)),
        find=lambda: Bound(held_weights(graph_module)),
        files=(path,),
    )


def _program_inputs(module: torch.fx.GraphModule) -> list[InputSpec]:
    """The inputs of a program; its dynamic dimensions are named `dim0`, `dim1`, ..."""
    names: dict[str, str] = {}
    inputs: list[InputSpec] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            dims: list[str | int] = []
            for size in value.shape:
                if isinstance(size, int):
                    dims.append(size)
                else:
                    dims.append(names.setdefault(str(size), f"dim{len(names)}"))
            inputs.append(InputSpec(str(node.target), str(value.dtype).removeprefix("torch."), tuple(dims)))
    return inputs


def from_examples(
    model: nn.Module, examples: Sequence[object] | Mapping[str, object], dynamic: Mapping[str, object] | None
) -> Base:
    """The base that is a module in memory, without the wrappers around it, and its inputs as in the examples.

    Args:
        model: the module.
        examples: what its forward takes, by position or by name: see `called`.
        dynamic: name of an input -> axis -> name of the dimension, such as `{"x": {0: "batch"}}`.

    Raises:
        TraceError: the examples do not fit `forward`, or `dynamic` names no input or no axis.
    """
    inner, notes = _prepared(model)
    call = called(inner, examples, dynamic)
    base = _held(call.model, call.inputs, [*notes, *call.notes])
    return replace(base, flatten=call.flatten, examples=call.examples)
