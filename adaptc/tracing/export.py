"""The one tracer: `torch.export`, without strict mode, into a graph of ATen operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from adaptc.errors import InputError, TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.explain import check_signature, explain, fixed_dimension
from adaptc.tracing.guards import check_sizes
from adaptc.tracing.quiet import quietly

aten = torch.ops.aten
REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
LABELS = "labels"
"""The input that only a loss needs; programs for inference leave it out."""
EXAMPLE_SIZES = (3, 17, 11, 19, 23, 29, 31)
"""Sizes given to named dimensions while tracing: different from one another, and from 1."""


def example_sizes(inputs: Sequence[InputSpec], among: Sequence[int] = EXAMPLE_SIZES) -> dict[str, int]:
    """A size for every named dimension, in the order of appearance."""
    names = dict.fromkeys(dim for spec in inputs for dim in spec.dims if isinstance(dim, str))
    if len(names) > len(among):
        raise TraceError(f"at most {len(among)} named dimensions are supported, got {', '.join(names)}")
    return dict(zip(names, among, strict=False))


def example_tensors(
    inputs: Sequence[InputSpec], sizes: Mapping[str, int], seed: int = 0, pad: bool = False
) -> dict[str, torch.Tensor]:
    """Random inputs, one distinct tensor each.

    Integers lie below the input's `high`; masks are ones, with `pad` zeros at the end of some rows. Other booleans
    are both: the first two of each row differ, so that a mask of either sense leaves something.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator).to(dtype)
        elif dtype == torch.bool and "mask" not in spec.name:
            tensor = torch.rand(shape, generator=generator) < 0.5
            if shape:
                tensor[..., 0], tensor[..., 1:2] = True, False
        elif "mask" in spec.name:
            tensor = torch.ones(shape, dtype=dtype)
            if pad and tensor.dim() == 2 and tensor.shape[1] > 1:
                tensor[-1, -(tensor.shape[1] // 2) :] = 0
        else:
            tensor = torch.randint(0, spec.high or 2, shape, generator=generator).to(dtype)
        tensors[spec.name] = tensor
    return tensors


def export(model: nn.Module, inputs: Sequence[InputSpec], training: bool = False) -> fx.GraphModule:
    """Trace a module to ATen operations with its named dimensions left open.

    Raises:
        InputError: the inputs are not those of forward, or a named dimension is fixed by the model.
        TraceError: torch.export refused the model; the text quotes the model's own source line.
    """
    check_signature(model, inputs)
    sizes = example_sizes(inputs)
    examples = example_tensors(inputs, sizes)
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # it fuses a whole layer, and an adapter inside could not sit there
    try:
        # Without gradients a trace leaves out conversions, whoever calls.
        with quietly(), torch.enable_grad():
            program = torch.export.export(
                model, (), examples, dynamic_shapes=dynamic_shapes(inputs), strict=False
            )
            check_sizes(model, program, inputs, sizes)
    except TraceError:
        raise
    except Exception as error:
        fixed = fixed_dimension(inputs, sizes, str(error))
        if fixed:
            raise InputError(fixed) from error
        raise TraceError(explain(model, error, examples)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
    return normalise(program.module(check_guards=False))


def dynamic_shapes(inputs: Sequence[InputSpec]) -> dict[str, dict[int, Any]]:
    """What torch.export calls the named dimensions."""
    return {
        spec.name: {index: Dim.DYNAMIC for index, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for spec in inputs
    }


def normalise(module: fx.GraphModule) -> fx.GraphModule:
    """A fresh graph module without the trace's own assertions, whose device constants follow its inputs."""
    module = fx.GraphModule(module, module.graph)
    graph = module.graph
    _inline_regions(module)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    followed = next((node for node in placeholders if node.target != LABELS), None)
    for node in list(graph.nodes):
        if node.target in (aten._assert_tensor_metadata.default, torch._check):
            graph.erase_node(node)
            continue
        if node.target is aten.embedding.default and len(node.args) > 4:
            node.update_arg(4, False)  # sparse gradients are for a table that is trained itself
    if followed is not None:
        follow_device(graph, followed, placeholders[-1])
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


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


def _inline_regions(module: fx.GraphModule) -> None:
    """Put the body of `torch.no_grad` and autocast regions into the graph itself.

    What leaves a region without gradients is detached, which says the same to autograd.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in REGIONS:
            continue
        at = next(
            i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _region(module, a) is not None
        )
        body = _region(module, node.args[at])
        assert body is not None
        if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is True:
            raise TraceError(
                "the model turns autocast on in its forward, which a graph cannot keep\n"
                "  take torch.autocast out of forward; give the base's dtype in the spec instead"
            )
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, dict(zip(inputs, node.args[at + 1 :], strict=True)))  # type: ignore[arg-type]
            values = list(results) if isinstance(results, (list, tuple)) else [results]
            if node.args[0] is False and node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                values = [_detached(graph, value) for value in values]
        for user in list(node.users):
            user.replace_all_uses_with(values[user.args[1]])  # type: ignore[arg-type, index]
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    if any(n.op == "get_attr" and _region(module, n) is not None for n in graph.nodes):
        _inline_regions(module)


def _region(module: fx.GraphModule, node: object) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = getattr(module, str(node.target), None)
    return found if isinstance(found, fx.GraphModule) else None


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not value.meta["val"].dtype.is_floating_point:
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def output_names(module: fx.GraphModule) -> tuple[str, ...]:
    """The names of the outputs: keys of a dict or model output, else `output`, `output_1`, ..."""
    spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names = []
    for index, path in enumerate(paths):
        parts = [str(getattr(key, "key", getattr(key, "idx", key))).strip(".'[]") for key in path]
        named = any(isinstance(getattr(key, "key", None), str) for key in path)
        names.append(".".join(parts) if named else "output" + (f"_{index}" if index else ""))
    return tuple(names)


def output_class(module: fx.GraphModule) -> str:
    """The full name of the class that holds the outputs, such as a model output of transformers."""
    spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return "" if spec.is_leaf() else f"{spec.type.__module__}.{spec.type.__qualname__}"
