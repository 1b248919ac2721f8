"""Plans and manifests as text, a line for what belongs together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

LEFT_OUT = frozenset(
    {
        "seconds",
        "sha256",
        "bytes",
        "reference",
        "proof",
        "proofs",
        "proved_on",
        "quantization",
        "rounding",
        "provenance",
    }
)
"""What a manifest says of times, hashes and measured numbers, and what it says twice."""
ELSEWHERE = frozenset({"cost", "graph", "latest", "spec", "spec_folder", "sites", "versions"})
"""What stands in the spec, in the plan, in the text of the graphs or in the constraints too."""


def plain_text(value: Any, path: str = "") -> Iterator[str]:
    """Plain data, a line each value, list or mapping of plain values; numbers to four digits."""
    items = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    if any(isinstance(item, dict | list) and (isinstance(value, dict) or item) for _, item in items) and not (
        path and _is_row(value)
    ):
        for key, item in items:
            yield from plain_text(item, f"{path}.{key}" if path else str(key))
    else:
        yield f"{path} = {_shown(value)}"


def manifest_text(manifest: dict[str, Any]) -> str:
    """What a manifest says, but for what differs from run to run and what is recorded elsewhere."""
    said = {key: value for key, value in manifest.items() if key not in ELSEWHERE}
    return "\n".join(plain_text(_without(said)))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without(item) for key, item in value.items() if key not in LEFT_OUT}
        return {key: item for key, item in kept.items() if key != item}  # a tensor that has but one name
    return [_without(item) for item in value] if isinstance(value, list) else value


def _is_row(value: Any) -> bool:
    """Whether it is a mapping of plain values and lists of them."""
    return isinstance(value, dict) and not any("{" in json.dumps(item) for item in value.values())


def _shown(value: Any) -> str:
    """A value as JSON; of a mapping each key and value that is not empty."""
    if not isinstance(value, dict):
        return json.dumps(_rounded(value), ensure_ascii=False)
    items = {key: item for key, item in value.items() if item not in ("", [])}
    return ", ".join(
        f"{key} {item if isinstance(item, str) else _shown(item)}" for key, item in items.items()
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value
