"""How patterns meet module names: globs, `re:`, layer ranges."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence


def matches(pattern: str, name: str) -> bool:
    r"""Whether a glob (`*.query`) or a full-match regex (`re:.*\.query`) names this module."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


ROLES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.in", "feed_forward.gate", "feed_forward.out", "embedding", "head"),
)
"""What a layer can do."""
SLICE_NAMES = ("q", "query", "k", "key", "v", "value", "gate", "up", "in")
"""What a slice of a fused weight can be called, besides its rows."""
_SLICES = re.compile(
    rf"(.+)\[((?:\d*:\d*|{'|'.join(SLICE_NAMES)})(?:\s*,\s*(?:\d*:\d*|{'|'.join(SLICE_NAMES)}))*)\]"
)


def sliced(pattern: str) -> tuple[str, list[str]]:
    """A pattern without its slices, and those: `*.c_attn[q,v]` is `*.c_attn` and q, v; `*.qkv[0:512]` its rows."""
    found = None if pattern.startswith("re:") else _SLICES.fullmatch(pattern)
    return (found[1], [part.strip() for part in found[2].split(",")]) if found else (pattern, [])


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """Whether at least one of the patterns names this module."""
    return any(matches(pattern, name) for pattern in patterns)


def layer_of(name: str) -> int | None:
    """The first numbered segment of a module's name: `encoder.layer.3.output` is layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(text: str) -> frozenset[int]:
    """Read `"0-5,11"` into a set of layer numbers.

    Raises:
        ValueError: the text is not made of numbers and ranges.
    """
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise ValueError(f"expected layers such as '0-5,11', got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"the range {part!r} runs backwards")
        layers.update(range(first, last + 1))
    return frozenset(layers)
