"""Export a module by `torch.export`, without strict mode, to a graph of ATen operations."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any, TextIO, cast

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.export import Dim
from torch.utils import _pytree as pytree

from adaptc.errors import TraceError
from adaptc.inputs import LABELS, InputSpec
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.nodes import follow_device, is_operator, writes_in_place
from adaptc.ir.shape_rules import shape_rules
from adaptc.ir.state import number_notes, numbers_of, restored
from adaptc.tracing.autograd_functions import functions_traced
from adaptc.tracing.constants import constants_followed, has_constants
from adaptc.tracing.containers import register_containers, step_of
from adaptc.tracing.control_flow import inline_control_flow
from adaptc.tracing.huggingface.code import (
    check_images_together,
    images_not_empty,
    images_together,
    masks_by_broadcasting,
)
from adaptc.tracing.known_values import keep_known
from adaptc.tracing.shape_guards import fixing_line, for_every_size
from adaptc.tracing.trace_errors import check_signature, check_traceable, explain, fixed_dimension

aten = torch.ops.aten
REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
CHANGED = "changed"
"""The key of a traced module's `meta` for notes on what a graph of it leaves out: changed numbers, gradients."""
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    cast(Any, torch)._check,
)
"""The operations by which a trace asserts what it assumed."""
CHECKS = (aten._assert_async.default, aten._assert_async.msg, aten._linalg_check_errors.default)
"""The operations by which torch checks values while a model runs, and raises an error."""


def export(model: nn.Module, inputs: Sequence[InputSpec], training: bool = False) -> fx.GraphModule:
    """Trace a module to ATen operations; its named dimensions stay dynamic.

    Args:
        model: the module; the modes of its parts are as before afterwards.
        inputs: the inputs of its `forward`.
        training: trace in training mode, not in evaluation mode.

    Returns:
        The trace; in its `meta` are notes on numbers that forward changes, and on functions whose gradients are their
        own, under `CHANGED`.

    Raises:
        InputError: the inputs are not those of forward, or a named dimension is fixed by the model.
        TraceError: torch.export refused the model; the text quotes the model's own source line.
    """
    check_signature(model, inputs)
    check_traceable(model)
    sizes = example_sizes(inputs)
    examples = example_tensors(inputs, sizes)
    training_of = {module: module.training for module in model.modules()}
    numbers, changed, modes = numbers_of(model), list[str](), list[Any]()
    constants = has_constants(model, inputs)
    weights: dict[str, torch.Tensor] = {}

    def after_call(module: nn.Module, args: object, result: object) -> None:
        register_containers(result)
        changed[:] = number_notes(module, numbers)
        modes.append(detect_fake_mode())
        weights.update((*module.named_parameters(), *module.named_buffers()))

    def traced_at(sizes: Mapping[str, int]) -> torch.export.ExportedProgram:
        shapes, tensors = dynamic_shapes(inputs), example_tensors(inputs, sizes)
        return torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)

    hook = model.register_forward_hook(after_call)
    model.train(training)
    try:
        with (
            traceable(),
            functions_traced() as backwards,
            restored(model),
            masks_by_broadcasting(),
            each_operation_new(modes),
            _images_and_constants(inputs, constants),
        ):
            program = for_every_size(model, traced_at, inputs, sizes)
    except TraceError:
        raise
    except Exception as error:
        where = fixing_line(modes[0], sizes.values()) if modes else None
        fixed = fixed_dimension(model, inputs, sizes, str(error), where)
        if fixed is not None:
            raise fixed from error
        raise explain(model, error, examples) from error
    finally:
        hook.remove()
        for module, mode in training_of.items():
            module.training = mode
    traced = normalise(program.module(check_guards=False), weights, constants)
    check_images_together(traced.graph.nodes)
    traced.meta[CHANGED] += [*changed, *backwards]
    return traced


@contextmanager
def _images_and_constants(inputs: Sequence[InputSpec], constants: bool) -> Generator[None]:
    """A context in which images in a text are traced, and what a model reads of constants in Python."""
    with ExitStack() as contexts:
        if any(spec.placeholders for spec in inputs):
            contexts.enter_context(images_together())
        if constants:
            contexts.enter_context(constants_followed())
            contexts.enter_context(images_not_empty())
        yield


def dynamic_shapes(inputs: Sequence[InputSpec]) -> dict[str, dict[int, Any]]:
    """The named dimensions as `torch.export` takes them: input name -> axis -> `Dim.DYNAMIC`."""
    return {
        spec.name: {index: Dim.DYNAMIC for index, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for spec in inputs
    }


def normalise(
    module: fx.GraphModule, weights: Mapping[str, torch.Tensor] | None = None, constants: bool = False
) -> fx.GraphModule:
    """Normalise an exported module.

    Inputs have the names of forward's arguments, which torch spells in small letters. Regions without gradients or with
    autocast, branches and fixed loops are inlined. The trace's own assertions, and what no output depends on, are
    removed. Tensors made on a constant device are made on the device of the first input that is no label.

    Args:
        module: the module.
        weights: name -> weight, as it was while the module was traced; branches and loops read these.
        constants: whether what it computes of constants alone is computed once.

    Returns:
        A new graph module; the tensors are shared.

    Raises:
        TraceError: the model turns autocast on.
    """
    module = fx.GraphModule(module, module.graph)
    graph = module.graph
    _inline_regions(module)
    if constants:
        keep_known(module, set((weights or {}).keys()))
    names = {id(tensor): name for name, tensor in (weights or {}).items()}
    module.meta[CHANGED] = inline_control_flow(module, names)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    arguments: list[str] = cast(Any, graph)._codegen.pytree_info.orig_args
    if len(arguments) == len(placeholders):
        for node, name in zip(placeholders, arguments, strict=True):
            node.target = name
    followed = next((node for node in placeholders if node.target != LABELS), None)
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
            continue
        if is_operator(node.target) and "out" in node.kwargs:
            node = _without_out(graph, node)
        if node.target is aten.embedding.default and len(node.args) > 4:
            node.update_arg(4, False)  # `sparse`: an adapted table is no leaf, as sparse gradients need
    if followed is not None:
        follow_device(graph, followed, placeholders[-1])
    graph.eliminate_dead_code(_has_effect)
    graph.lint()
    module.recompile()
    return module


def _without_out(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Let an operation that writes its result to `out` return it, and copy it there: `add(x, y, out=z)`.

    Returns:
        The copy; the node itself where torch has no such operation that returns one result.
    """
    written, target = node.kwargs["out"], cast(Any, node.target)
    taken = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    packet = target._overloadpacket
    overloads = [getattr(packet, name) for name in packet.overloads()]
    returning = [o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == taken]
    if not returning:
        return node
    with graph.inserting_before(node):
        value = graph.call_function(
            returning[0], node.args, {k: v for k, v in node.kwargs.items() if k != "out"}
        )
        value.meta = dict(node.meta)
        copied = graph.call_function(aten.copy_.default, (cast(fx.Node, written), value))
        copied.meta = dict(node.meta)
    node.replace_all_uses_with(copied)
    graph.erase_node(node)
    return copied


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something that no other node reads; drawing random numbers, as attention may, is nothing."""
    return node.is_impure(impure_random=False)


def _inline_regions(module: fx.GraphModule) -> None:
    """Inline the regions of `torch.no_grad` and autocast into the graph.

    The results of a region without gradients are detached, which is the same to autograd.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in REGIONS:
            continue
        bodies = [_region_body(module, argument) for argument in node.args]
        at, body = next((i, body) for i, body in enumerate(bodies) if body is not None)
        if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is True:
            raise TraceError(
                "the model turns autocast on in its forward, which a graph cannot keep",
                "take torch.autocast out of forward; give the base's dtype in the spec instead",
            )
        set_grad = torch.ops.higher_order.wrap_with_set_grad_enabled
        no_gradients = node.target is set_grad and node.args[0] is False
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            operands = cast(tuple[fx.Node, ...], node.args[at + 1 :])
            if no_gradients and any(writes_in_place(inner.target) for inner in body.graph.nodes):
                operands = tuple(_detached(graph, value) for value in operands)  # nor has what is written
            results: Any = graph.graph_copy(body.graph, dict(zip(inputs, operands, strict=True)))
            values = list(cast(Sequence[Any], results)) if isinstance(results, (list, tuple)) else [results]
            if no_gradients:
                values = [_detached(graph, value) for value in values]
        for user in list(node.users):
            user.replace_all_uses_with(values[cast(int, user.args[1])])
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    if any(node.target in REGIONS for node in graph.nodes):
        _inline_regions(module)


def _region_body(module: fx.GraphModule, argument: object) -> fx.GraphModule | None:
    """The graph module that a `get_attr` node names; None for any other argument."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    body = getattr(module, str(argument.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _detached(graph: fx.Graph, value: object) -> Any:
    if not isinstance(value, fx.Node) or not value.meta["val"].dtype.is_floating_point:
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def output_names(module: fx.GraphModule) -> tuple[str, ...]:
    """The names of the outputs: keys of a dict, fields of a dataclass or named tuple, else `output`, `output_1`, ..."""
    spec = _output_spec(module)
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths: list[tuple[Any, ...]] = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names: list[str] = []
    for index, path in enumerate(paths):
        steps = [step_of(key) for key in path]
        parts, named = [str(step) for step in steps], any(isinstance(step, str) for step in steps)
        names.append(".".join(parts) if named else "output" + (f"_{index}" if index else ""))
    return tuple(names)


def output_class(module: fx.GraphModule) -> str:
    """The full name of the class that holds the outputs, such as a model output of transformers; "" for one tensor."""
    spec = _output_spec(module)
    return "" if spec.is_leaf() else f"{spec.type.__module__}.{spec.type.__qualname__}"


def _output_spec(module: fx.GraphModule) -> Any:
    """The pytree spec of a module's outputs."""
    return cast(Any, module.graph)._codegen.pytree_info.out_spec


@contextmanager
def each_operation_new(modes: Sequence[Any]) -> Generator[None]:
    """Let torch keep no result of an operation within a `with` block, for one that is like it.

    A trace seldom runs the same operation on the same sizes, and keeping a result of symbolic sizes takes longer than
    running it: without, traces of two layers of Llama take 4.7 s in place of 8.9 s.

    Args:
        modes: of fake tensors, those that are made in the block: they keep results after it, since passes run the
            operations of a trace again.
    """
    with cast(Any, torch)._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield
    for mode in modes:
        if mode is not None:
            mode.cache_enabled = True


LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",  # logs before an error what the error says, as does the next one
    "torch._subclasses.fake_tensor",
    "torch.onnx._internal.exporter._registration",  # logs every operation of packages that are not installed
    "onnx_ir._convenience",  # logs an empty list of indices, which is intended
    "onnxscript.optimizer._constant_folding",  # logs what it does not fold
)
"""The loggers that are silenced while a model is traced or translated."""


class _WithoutGraphs:
    """A stream without the graphs that torch.export prints when it fails."""

    def __init__(self, stream: TextIO):
        self._stream, self._skips = stream, False

    def write(self, text: str) -> int:
        ends, self._skips = self._skips and text == "\n", "def forward(self" in text
        return len(text) if ends or self._skips else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def traceable() -> Generator[None]:
    """Let torch trace within a `with` block what it runs: silently, no layer fused, whatever the caller has set."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # it fuses a layer, so that nothing inside could be adapted
    try:
        # Without gradients a trace leaves out conversions.
        stance = torch.compiler.set_stance("force_eager")
        with quietly(), torch.enable_grad(), stance, shape_rules():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def quietly() -> Generator[None]:
    """Silence torch within a `with` block: its warnings, its loggers, and the graph that a failed export prints."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(cast(TextIO, _WithoutGraphs(sys.stderr))):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
