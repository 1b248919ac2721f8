"""The functions of the Python API that are not a method of something else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx, nn

from adaptc.checkpoints.module_adapters import load_adapter_into, save_adapter_of
from adaptc.compiler.alternatives.loaded import LoadedMaker
from adaptc.compiler.changes import comparison
from adaptc.emit.torch import load_torch
from adaptc.ir.graph import Graph
from adaptc.ir.switched import SwitchedModule
from adaptc.rewriter.pipeline import Pass
from adaptc.rewriter.pipeline import run as run_passes
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base


def trace(
    model: nn.Module,
    example_inputs: Sequence[object] | Mapping[str, object],
    dynamic: Mapping[str, object] | None = None,
) -> Graph:
    """Trace a module into a graph: ATen operations on weights that are bound later.

    Args:
        model: the module.
        example_inputs: tensors, by position or by name.
        dynamic: `{"x": {0: "batch"}}`, the dimensions that vary.

    Raises:
        TraceError: the module cannot be traced.
        InputError: the examples are not what its `forward` takes.
    """
    return trace_base(from_examples(model, example_inputs, dynamic))


def run(graph: Graph, passes: Sequence[Pass]) -> Graph:
    """Run passes on a copy of a graph, in the order written, each checked.

    A pass that is not adaptc's own is run on random inputs too, to measure whether it changes results.

    Raises:
        RefusedError: a pass refuses the graph, or changes results without declaring `changes_results`.
        VerifyError: a pass left a graph that is not legal.
    """
    return run_passes(graph, passes, compare=comparison())


def load(path: str | Path) -> fx.GraphModule:
    """Load a torch artifact as a trainable module.

    Raises:
        WeightError: it is no torch artifact, or broken.
    """
    module = load_torch(Path(path))
    if isinstance(module, SwitchedModule):
        module.let_change(LoadedMaker(module))
    return module


def save_adapter(module: fx.GraphModule, directory: str | Path) -> None:
    """Write the adapters of a module that adaptc compiled as PEFT checkpoints.

    A warning names the layers that the installed PEFT leaves out when it loads them.

    Raises:
        WeightError: the module is not one that adaptc compiled.
        ProofError: a tensor is not read back as it was written.
    """
    for note in save_adapter_of(module, Path(directory)):
        warnings.warn(note, stacklevel=2)


def load_adapter(module: fx.GraphModule, directory: str | Path, ignore: Sequence[str] = ()) -> None:
    """Replace the weights of a module's adapters by those of a checkpoint: all of them, or none after an error.

    A warning says what was read otherwise than it is written, such as names of an earlier transformers.

    Args:
        module: a module that adaptc compiled.
        directory: the checkpoint.
        ignore: options of its configuration to read it without, as in an entry of a spec.

    Raises:
        WeightError: the checkpoint does not fit what was inserted.
    """
    for note in load_adapter_into(module, Path(directory), ignore).notes:
        warnings.warn(note, stacklevel=2)
