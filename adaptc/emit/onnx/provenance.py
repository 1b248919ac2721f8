"""What an ONNX file says of its own compile, in its metadata: a copy of the file alone can be verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx

from adaptc.errors import ProofError

KEY = "adaptc.provenance"
"""The key in a program's metadata."""


def embed(path: Path, record: Mapping[str, object]) -> None:
    """Add a record to a program's metadata, with the SHA-256 of the file before that and of the record.

    Protocol buffers are merged when they are joined: so the entry is appended, and no byte before it changes.

    Args:
        path: the program.
        record: plain data.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    with open(path, "ab") as file:
        file.write(_entry(_text(record, digest)))


def embedded(path: Path) -> dict[str, Any] | None:
    """The record that `embed` wrote; None where a program has none.

    Raises:
        ProofError: it has one, and the file was changed since, or is no ONNX program any more.
    """
    try:
        model: Any = cast(Any, onnx).load(path, format="protobuf", load_external_data=False)
    except Exception as error:
        raise ProofError(f"{path}: no ONNX program: {str(error).splitlines()[0]}") from error
    text = next((item.value for item in model.metadata_props if item.key == KEY), None)
    if text is None:
        return None
    content, entry = path.read_bytes(), _entry(text)
    body = memoryview(content)[: len(content) - len(entry)]
    try:
        record: dict[str, Any] = json.loads(text)
    except ValueError:
        record = {}
    stated = {key: value for key, value in record.items() if key != "sha256"}
    if not content.endswith(entry) or _text(stated, hashlib.sha256(body)) != text:
        raise ProofError(f"{path}: changed since it was compiled (its SHA-256 differs)")
    return record


def _text(record: Mapping[str, Any], before: Any) -> str:
    """A record with `sha256`: of the bytes before it, of which `before` is the digest so far, and of the record."""
    before.update(json.dumps(record).encode())
    return json.dumps({**record, "sha256": before.hexdigest()})


def _entry(text: str) -> bytes:
    """A program of nothing but this entry of its metadata, as bytes."""
    model = onnx.ModelProto()
    model.metadata_props.add(key=KEY, value=text)
    return model.SerializeToString()
