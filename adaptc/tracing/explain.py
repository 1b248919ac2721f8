"""Why a model could not be traced, in words that show its author's own line."""

from __future__ import annotations

import inspect
import linecache
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from adaptc.errors import InputError
from adaptc.inputs import InputSpec

LIBRARIES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent.parent),
    str(Path(sysconfig.get_path("stdlib"))),
)
"""Where a line is not the model author's, except below site-packages."""


def check_signature(model: nn.Module, inputs: Sequence[InputSpec]) -> None:
    """Check that forward takes these inputs by name.

    Raises:
        InputError: says what it takes.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**{spec.name: None for spec in inputs})
    except TypeError as error:
        names = ", ".join(spec.name for spec in inputs)
        raise InputError(
            f"{type(model).__name__}.forward takes ({', '.join(signature.parameters)}), but the inputs are "
            f"({names}): {error}"
        ) from None


def fixed_dimension(inputs: Sequence[InputSpec], sizes: Mapping[str, int], text: str) -> str | None:
    """Words for a dimension that `inputs` names but the model fixes, if that is what torch.export says."""
    found = re.search(r"Constraints violated.*?L\['(\w+)'\].*?size\(\)\[(\d+)\]", text, re.DOTALL)
    spec = next((spec for spec in inputs if found and spec.name == found[1]), None)
    if found is None or spec is None:
        return None
    index = int(found[2])
    size = sizes.get(str(spec.dims[index]))
    dims = ", ".join(str(size if i == index else dim) for i, dim in enumerate(spec.dims))
    return (
        f"input {spec.name}: dimension `{spec.dims[index]}` is fixed to {size} by the model: "
        f"write {spec.dtype}[{dims}]"
    )


def explain(model: nn.Module, error: Exception) -> str:
    """What torch.export said first, the author's line, and what to do where that is known."""
    text = str(error).strip()
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+', text)
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, str(trace.tb_lineno)))
        trace = trace.tb_next
    outside = [(path, int(line)) for path, line in frames if _is_authors(path)]
    lines = [f"{type(model).__name__} could not be traced: {first}"]
    if outside:
        path, line = outside[-1]
        lines.append(f"  at {path}:{line}    {linecache.getline(path, line).strip()}".rstrip())
    if any(word in text for word in ("data-dependent", "DataDependent", "guard on")):
        lines.append(
            "  torch.export needs a forward whose control flow does not depend on tensor values: "
            "use torch.where or torch.cond there, or move that choice out of forward"
        )
    return "\n".join(lines)


def _is_authors(path: str) -> bool:
    torch_home, own_home, stdlib = LIBRARIES
    if path.startswith(("<", torch_home, own_home)):
        return False
    return "site-packages" in path or not path.startswith(stdlib)
