"""Why a model could not be traced: the error shows the author's own line, what was expected there, and what helps."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from adaptc.errors import InputError, TraceError, did_you_mean, nearest
from adaptc.inputs import InputSpec
from adaptc.registry.calls import ON_VALUES
from adaptc.tracing.author_lines import INSTALLED, is_model_code, lines_with, source_line


@dataclass(frozen=True)
class Reason:
    """One way in which a forward cannot be traced.

    Attributes:
        error: a regex on torch's error text.
        source: a regex on the author's source line.
        message: what is wrong, for the author.
        expected: what a forward must do instead.
        advice: how to change it.
        search: a regex on the author's source, where torch's error names no line.
    """

    error: str
    source: str
    message: str
    expected: str
    advice: str
    search: str = ""

    def fits(self, error: str, source: str) -> bool:
        """Whether this reason explains an error text at a source line."""
        return bool(re.search(self.error, error) and re.search(self.source, source))


REASONS = (
    Reason(
        r"\.numpy\(\)|__array__|ndarray",
        r"",
        "a tensor leaves torch for numpy",
        "operations of torch only: numpy's results would be constants of the graph",
        "write it with torch, or compute it before the model is called and hand it in as an input",
    ),
    Reason(
        r"fake tensor in the exported program constant's list",
        r"",
        "a tensor is taken out of the trace, as `.data` does",
        "operations that a trace sees",
        "write x.detach() in place of x.data",
        search=r"\.data\b",
    ),
    Reason(
        r"Inference tensors cannot be saved for backward",
        r"",
        "a tensor is made in torch.inference_mode, and nothing behind it can be trained",
        "tensors that gradients can pass",
        "write torch.no_grad() in place of torch.inference_mode()",
    ),
    Reason(
        r"",
        r"\b(pack_padded_sequence|pad_packed_sequence|pack_sequence)\(",
        "a packed sequence has sizes that depend on the values of a tensor",
        "sequences padded to one length",
        "run the recurrent layer on the padded tensor, and select what is wanted of its outputs by a mask or by gather",
    ),
    Reason(
        r"padded input size|[Kk]ernel size can't be greater",
        r"",
        "an input is too short for a convolution, or for the window of one",
        "inputs as long as the model needs them",
        "write its size as a number in `inputs`, such as input_values: float32[batch, 16000]",
    ),
    Reason(
        r"Found <class '[\w.]*Cache'> in output",
        r"",
        "the model returns a cache of keys and values",
        "outputs that are tensors; a graph has no cache yet",
        "write model.config.use_cache = False before it is compiled",
    ),
    Reason(
        r"Pending unbacked symbols",
        r"",
        "a position or a size is taken from the values of a tensor",
        "positions and sizes that follow from the shapes of the inputs",
        "select by the tensor itself, with index_select, gather or a mask",
    ),
    Reason(
        ON_VALUES,
        r"^assert\b",
        "an assertion depends on the values of a tensor",
        "a forward that runs the same operations whatever the values are",
        "check it before the model is called, and leave it out of forward",
    ),
    Reason(
        ON_VALUES,
        r"^(for|while)\b|\brange\(",
        "the number of iterations of a loop depends on the values of a tensor",
        "a loop over shapes, or over numbers known before the call",
        "run the largest number of iterations and select by torch.where, or move the loop out of forward",
    ),
    Reason(
        ON_VALUES,
        r"^(if|elif)\b|\bif\b.*\belse\b|\bbool\(",
        "a branch depends on the values of a tensor",
        "a forward whose control flow does not depend on tensor values",
        "use torch.where there, or move that choice out of forward",
    ),
    Reason(
        ON_VALUES,
        r"\bint\(|\.tolist\(|\[.*:.*\]|\b(arange|zeros|ones|full|empty|expand|view|reshape|narrow|split)\(",
        "a size depends on the values of a tensor",
        "sizes that follow from the shapes of the inputs",
        "keep the whole tensor and mask by torch.where what would be cut off, or compute the size before the model "
        "is called",
    ),
    Reason(
        ON_VALUES,
        r"\bfloat\(|\.item\(",
        "a number is taken out of a tensor",
        "values that stay tensors",
        "leave out float() or .item(): a tensor without dimensions computes like a number",
    ),
    Reason(
        ON_VALUES,
        r"",
        "something there depends on the values of a tensor",
        "a forward whose control flow and sizes do not depend on tensor values",
        "use torch.where there, or move it out of forward",
    ),
)
"""The reasons that are recognised; the first that fits is reported."""


SMALL = 64
"""The most values of a tensor that may be a size."""


def check_signature(model: nn.Module, inputs: Sequence[InputSpec]) -> None:
    """Check that forward takes these inputs by name.

    Raises:
        InputError: it does not; the message says which parameters it has.
    """
    signature = inspect.signature(model.forward)
    parameters = [name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
    misspelt = next(
        (s.name for s in inputs if s.name not in parameters and nearest(s.name, parameters, 1, 0.75)), None
    )
    if misspelt is not None:
        raise InputError(
            f"{type(model).__name__}.forward takes no {misspelt!r}{did_you_mean(misspelt, parameters)}"
        )
    try:
        signature.bind(**{spec.name: None for spec in inputs})
    except TypeError as error:
        names = ", ".join(spec.name for spec in inputs)
        raise InputError(
            f"{type(model).__name__}.forward takes ({', '.join(signature.parameters)}), but the inputs are "
            f"({names}): {error}"
        ) from None


FIXERS = (
    (r"\blen\((\w+)", "len() gives a number, which the trace keeps: write {0}.shape[0] in place of len({0})"),
    (
        r"\bfor\b.*\bin\b",
        "a loop runs as often as when it was traced: write it as operations on the whole tensor",
    ),
    (r"\b(?:int|float)\(", "int() gives a number, which the trace keeps: use the size itself, without int()"),
)
"""A regex on the author's line -> why a dimension is fixed there, and what to write in place of it."""


def fixed_dimension(
    model: nn.Module,
    inputs: Sequence[InputSpec],
    sizes: Mapping[str, int],
    text: str,
    where: tuple[str, int] | None,
) -> InputError | None:
    """The error for a dimension that `inputs` names but the model fixes.

    Args:
        model: the model.
        inputs: the inputs as specified.
        sizes: name of a dimension -> the size it was traced with.
        text: the error text of torch.export.
        where: file and line of the author's that fixed it, if torch tells; else the one line that may have.

    Returns:
        The error, or None where the error text says something else.
    """
    match = re.search(r"Constraints violated.*?L\['(\w+)'\].*?size\(\)\[(\d+)\]", text, re.DOTALL)
    spec = next((spec for spec in inputs if match and spec.name == match[1]), None)
    if match is None or spec is None:
        return None
    index = int(match[2])
    size = sizes.get(str(spec.dims[index]))
    dims = ", ".join(str(size if i == index else dim) for i, dim in enumerate(spec.dims))
    message = (
        f"input {spec.name}: dimension `{spec.dims[index]}` is fixed by the model, which computes differently at each "
        f"size (it was traced with {size}): write the size you will run it with, such as {spec.dtype}[{dims}]"
    )
    candidates = [where] if where else lines_with(model, "|".join(pattern for pattern, _ in FIXERS))
    if len(candidates) != 1:
        return InputError(message)
    where = candidates[0]
    line = linecache.getline(*where).strip()
    matches = [(re.search(pattern, line), advice) for pattern, advice in FIXERS]
    mends = [advice.format(*fixer.groups()) for fixer, advice in matches if fixer][:1]
    return InputError(message, f"at {source_line(*where)}", *mends)


QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""The packages of torch's layers whose weights are packed for a kernel."""


def check_traceable(model: nn.Module) -> None:
    """Check that a model has no part that torch.export never traces.

    Raises:
        TraceError: names one: a scripted or quantized module, or a lazy layer that has not been run.
    """
    for name, part in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"{name or 'the model'} is a scripted module ({cast(Any, part).original_name}), which torch.export "
                "does not trace",
                "leave out torch.jit.script or torch.jit.load there, and use the module that was scripted",
            )
        if type(part).__module__.startswith(QUANTIZED):
            raise TraceError(
                f"{name or 'the model'} is a quantized module of torch ({type(part).__name__}), which torch.export "
                "does not trace",
                "hand in the model as it was before torch quantized it, and quantize it by `quantize` in the spec",
            )
        lazy = [key for key, value in part.named_parameters(recurse=False) if is_lazy(value)]
        if lazy:
            layer = f"{name or 'the model'} ({type(part).__name__})"
            raise TraceError(
                f"{layer} has no {lazy[0]} yet: a lazy layer makes it when it runs",
                "run the model once on an example before it is compiled",
            )


def explain(model: nn.Module, error: Exception, examples: Mapping[str, torch.Tensor]) -> TraceError:
    """The error for a model that cannot be traced: the author's own line, what was expected there, what to do.

    Args:
        model: the model.
        error: what torch.export raised.
        examples: the example inputs by name.
    """
    text = str(error).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    frames = _model_frames(error, text)
    source = linecache.getline(*frames[-1]).strip() if frames else ""
    told = f"{type(error).__name__}: {text}"
    reason = next((reason for reason in REASONS if reason.fits(told, source)), None)
    message = f"{type(model).__name__} could not be traced: {reason.message if reason else first}"
    searched = lines_with(model, reason.search) if reason and reason.search and not frames else []
    notes = [f"at {source_line(path, line)}" for path, line in [*_innermost(frames), *searched]]
    if reason is None:
        shapes = ", ".join(f"{name} of shape {list(value.shape)}" for name, value in examples.items())
        return TraceError(message, *notes, f"{type(error).__name__}, with {shapes}")
    notes += [f"expected {reason.expected}", reason.advice]
    notes += _as_constants(examples) if reason.error == ON_VALUES else []
    if frames and INSTALLED in frames[-1][0]:
        notes.append("that line is a library's: a setting in base.config or another base.dtype may avoid it")
    return TraceError(message, *notes, f"torch.export says: {first}")


def _as_constants(examples: Mapping[str, torch.Tensor]) -> list[str]:
    """What to write where the tensor whose values are read is a size: a small one of integers, and no text or mask."""
    small = [
        name
        for name, value in examples.items()
        if value.numel() <= SMALL and not value.is_floating_point() and not re.search("ids|mask", name)
    ]
    return [
        f"if {name} is the same in every call, write its value under `inputs`, such as {name}: "
        f"{cast(Any, examples[name]).tolist()}"
        for name in small
    ]


def _model_frames(error: Exception, text: str) -> list[tuple[str, int]]:
    """File and line of every frame of the model and of what it calls outside of torch, outermost first."""
    frames = [(path, int(line)) for path, line in re.findall(r'File "([^"]+)", line (\d+), in \S+', text)]
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return [(path, line) for path, line in frames if is_model_code(path)]


def _innermost(frames: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The innermost line; where that is a library's, the innermost one of the author's own too."""
    authors = [(path, line) for path, line in frames if INSTALLED not in path]
    return list(dict.fromkeys([*frames[-1:], *authors[-1:]]))
