"""Patterns on module names: globs, `re:` regexes, slices of a fused weight, layer ranges."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence


def matches(pattern: str, name: str) -> bool:
    r"""Whether a pattern matches the whole of a module's name; it is a glob (`*.query`) or a regex (`re:.*\.query`)."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def literal(name: str) -> str:
    """The glob that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


ROLES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.in", "feed_forward.gate", "feed_forward.out", "embedding", "head"),
)
"""The roles that a layer can have, read from the model's dataflow."""
SLICE_NAMES = ("q", "query", "k", "key", "v", "value", "gate", "up", "in")
"""The names of the slices of a fused weight. A slice can also be given by its rows."""
_SLICES = re.compile(
    rf"(.+)\[((?:\d*:\d*|{'|'.join(SLICE_NAMES)})(?:\s*,\s*(?:\d*:\d*|{'|'.join(SLICE_NAMES)}))*)\]"
)


def sliced(pattern: str) -> tuple[str, list[str]]:
    """Take the slices off a pattern.

    Returns:
        The pattern without them, and the slices: of `*.c_attn[q,v]` `*.c_attn` and `["q", "v"]`, of `*.qkv[0:512]`
        `*.qkv` and `["0:512"]`. A pattern without slices, or a regex, is returned whole with an empty list.
    """
    match = None if pattern.startswith("re:") else _SLICES.fullmatch(pattern)
    return (match[1], [part.strip() for part in match[2].split(",")]) if match else (pattern, [])


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """Whether at least one of the patterns matches a module's name."""
    return any(matches(pattern, name) for pattern in patterns)


def layer_of(name: str) -> int | None:
    """The number of the layer a module is in: the first numbered segment of its name, 3 of `encoder.layer.3.output`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(text: str) -> frozenset[int]:
    """Read `"0-5,11"` into a set of layer numbers.

    Raises:
        ValueError: the text holds something else than numbers and ranges, or a range ends before it starts.
    """
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"expected layers such as '0-5,11', got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part!r} runs backwards")
        layers.update(range(first, last + 1))
    return frozenset(layers)
