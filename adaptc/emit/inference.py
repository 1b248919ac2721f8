"""For inference: the graph as an exporter wants it, and the module with kernels for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from adaptc.emit.evaluate import Evaluate
from adaptc.errors import RefusedError
from adaptc.graph import Graph, bind
from adaptc.pipeline import run
from adaptc.proof import Each, runner
from adaptc.registry import load_passes

if TYPE_CHECKING:
    from adaptc.compiled import Compiled


def inference_module(compiled: Compiled, tokens: int, device: str) -> fx.GraphModule:
    """The folded graph with kernels for quantized weights, as a module on a device; proved there."""
    known = load_passes()
    kernels = known["torch-kernels"](tokens=tokens, device=device)  # type: ignore[call-arg]
    refusals = kernels.requires(compiled.graph)
    if refusals:
        raise RefusedError(refusals)
    folded = compiled.folded_graph()
    graph = run(folded, [known["plain-integers"](), kernels])
    module = bind(graph).eval().to(device)
    # A GPU's convolutions round float32 to 10 bits unless told otherwise, which no proof allows.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        compiled.prove(f"kernels on {device}", graph, compiled.streamed(folded), Each(runner(module, device)))
    return module


def inference_graph(graph: Graph) -> Graph:
    """A copy that only evaluates, as an exporter wants it: integers are plain, and see `Evaluate`."""
    return run(graph, [load_passes()["plain-integers"](), Evaluate()])
