"""The files of a directory of onnxruntime-genai. Reading them needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

CONFIG, PROGRAM, ENCODER = "genai_config.json", "model.onnx", "encoder.onnx"
TOKENIZER = "tokenizer.json"


def write_config(directory: Path, content: Mapping[str, Any]) -> None:
    """Write genai_config.json."""
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> dict[str, Any]:
    """Read genai_config.json."""
    return json.loads((directory / CONFIG).read_text(encoding="utf-8"))


def tokens_of(stated: Any) -> list[int]:
    """What a configuration says of the tokens that end a text: none, one, or a list."""
    if stated is None:
        return []
    return list(cast("list[int]", stated)) if isinstance(stated, list) else [int(stated)]
