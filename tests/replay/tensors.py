"""Tensors as text: a line each, with a hash for the machine that recorded it and a fingerprint for any other.

A line says name, dtype, shape, the first 16 digits of the SHA-256 of the bytes, and the fingerprint: the largest
absolute value, the L2 norm, and the dot product with fixed random signs.
"""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

FLOAT_TOLERANCE = 256
"""A fingerprint of floats may differ by so many eps of the dtype, relative to the largest value or the norm."""
INTEGER_TOLERANCE = 0.02
"""A fingerprint of integers may differ by this share: a code between two values may take either."""


@dataclass(frozen=True)
class Line:
    """One tensor, as recorded."""

    kind: str
    sha256: str
    largest: float
    norm: float
    dot: float

    @property
    def tolerance(self) -> float:
        """The relative difference allowed on another machine."""
        dtype = getattr(torch, self.kind.partition("[")[0])
        return FLOAT_TOLERANCE * torch.finfo(dtype).eps if dtype.is_floating_point else INTEGER_TOLERANCE


def tensors_text(tensors: Mapping[str, torch.Tensor]) -> str:
    """A line a tensor, in the order of their names."""
    return "\n".join(_line(name, tensors[name].detach().cpu().contiguous()) for name in sorted(tensors))


def tensors_differ(recorded: str, current: str) -> str:
    """What differs beyond the tolerance, a line a tensor; "" if nothing does."""
    before, after = _parsed(recorded), _parsed(current)
    wrong: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old.kind != new.kind:
            wrong.append(f"{name}: recorded {old}, now {new}")
            continue
        pairs = (
            (old.largest, new.largest, old.largest),
            (old.norm, new.norm, old.norm),
            (old.dot, new.dot, old.norm),
        )
        for one, other, scale in pairs:
            same = one == other or (math.isnan(one) and math.isnan(other))
            if not same and not abs(one - other) <= old.tolerance * scale:
                wrong.append(f"{name}: recorded {old}, now {new}, tolerance {old.tolerance:.2g}")
                break
    return "\n".join(wrong)


def machine() -> str:
    """What decides about the last bits of a float: the processor, the kernels that torch chose, and its version."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", cpu)
    flags = re.search(r"flags\s*: (.+)", cpu)
    return (
        f"processor: {model[1] if model else platform.processor()}\n"
        f"flags: {hashlib.sha256((flags[1] if flags else '').encode()).hexdigest()[:16]}\n"
        f"kernels: {torch.backends.cpu.get_cpu_capability()}\n"
        f"torch: {torch.__version__}\n"
    )


def _line(name: str, tensor: torch.Tensor) -> str:
    data = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    wide = tensor.reshape(-1).to(torch.float64)
    signs = torch.randint(0, 2, wide.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers = (wide.abs().max() if len(wide) else wide.sum(), wide.norm(), wide @ signs.double())
    shape = f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
    return f"{name} {shape} {data} {' '.join(f'{float(number):.9g}' for number in numbers)}"


def _parsed(text: str) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for line in text.splitlines():
        name, kind, sha256, *numbers = line.rsplit(" ", 5)
        lines[name] = Line(kind, sha256, *map(float, numbers))
    return lines
