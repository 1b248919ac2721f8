"""Adapter checkpoints as found on disk: read, checked, and matched with what was inserted."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import WeightError
from adaptc.methods.virtual_tokens import CLASSIFIER_HEADS, PROMPT_KEY
from adaptc.weights import Held, Weight, open_safetensors, read_safetensors, sha256_of_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLE, ORDER = "adapter_model.bin", "adapters.json"
ROOT = "base_model."
PREFIX = f"{ROOT}model."
"""What stands in front of every key; `ROOT` alone in front of a tensor that belongs to no module."""
BASE_HASH, BESIDE = "base_sha256", "base_tensors"
"""What adaptc notes in a file: the base it was trained on, and which tensors are that base's own."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as found on disk; tensors are not loaded.

    Attributes:
        path: its directory.
        config: its configuration.
        tensors: key without PEFT's prefix -> tensor.
        base_sha256: the base it was trained on, where adaptc wrote it.
        saved_modules: modules trained whole whose tensors it holds.
        beside: the base's own tensors that adaptc wrote for PEFT.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    base_sha256: str | None = None
    saved_modules: tuple[str, ...] = ()
    beside: Mapping[str, Weight] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it is in adaptc's own format, for what PEFT has no format for."""
        return bool(self.config.get("adaptc_method"))

    @property
    def carried(self) -> dict[str, Weight]:
        """Base weights that PEFT saved along, by the base's name, as it does with embeddings whose size may change."""
        marker = ".base_layer.weight"
        found = {k.replace(marker, ".weight"): t for k, t in self.tensors.items() if k.endswith(marker)}
        return {**found, **self.beside}

    @property
    def sha256(self) -> str:
        """SHA-256 over its configuration and tensors; a file's own bytes vary with the order of its metadata."""
        tensors = sha256_of_tensors(self.tensors.items())
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(f"{config}\n{tensors}".encode()).hexdigest()


def directories(path: Path) -> list[Path]:
    """The checkpoints in a directory, in the order they apply.

    Raises:
        WeightError: the file that holds the order is broken.
    """
    order = path / ORDER
    if not order.is_file():
        return [path]
    names = _json(order).get("order")
    plain = isinstance(names, list) and all(isinstance(n, str) and Path(n).name == n for n in names)
    if not names or not plain:
        raise WeightError(f'{order}: expected {{"order": [...]}} with the names of the folders beside it')
    return [path / name for name in names]


def why_missing(path: Path) -> str | None:
    """Why there is no checkpoint at a path, or None if there is one."""
    if not path.is_dir():
        return f"{path}: no such directory; expected an adapter's checkpoint with {CONFIG} and {TENSORS}"
    if not (path / CONFIG).is_file() and not (path / ORDER).is_file():
        return f"{path}: no {CONFIG} there, so this is no adapter's checkpoint (save_pretrained writes one)"
    return None


def read(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint's configuration and the shapes of its tensors.

    Raises:
        WeightError: it is missing, truncated, pickled, or not an adapter of a known format.
    """
    absent = why_missing(path)
    if absent or not (path / CONFIG).is_file():
        raise WeightError(absent or f"{path}: no {CONFIG} there")
    config = _json(path / CONFIG)
    about: Mapping[str, str] = {}
    if (path / TENSORS).is_file():
        about = open_safetensors(path / TENSORS).metadata() or {}
        tensors: Mapping[str, Weight] = read_safetensors(path / TENSORS)
    elif (path / PICKLE).is_file():
        tensors = _unpickled(path / PICKLE, allow_pickle)
    else:
        raise WeightError(f"{path}: no {TENSORS} there")
    if PROMPT_KEY in tensors:
        tensors = {_with_prefix(key): weight for key, weight in tensors.items()}
    for key, weight in tensors.items():
        if not key.startswith(ROOT):
            raise WeightError(
                f"{path}: tensor {key!r} does not start with {PREFIX!r}: not a checkpoint as PEFT writes it"
            )
        if weight.dtype in (torch.uint8, torch.bool):
            raise WeightError(f"{path}: tensor {key!r} is {_kind(weight)}, which no adapter has")
    named = {key.removeprefix(PREFIX): weight for key, weight in tensors.items()}
    beside = {key: named.pop(key) for key in about.get(BESIDE, "").split() if key in named}
    listed = config.get("modules_to_save") or (sorted(CLASSIFIER_HEADS) if ROOT + PROMPT_KEY in named else [])
    return Checkpoint(path, config, named, about.get(BASE_HASH), _saved(listed, named), beside)


def _with_prefix(key: str) -> str:
    """A key of a checkpoint with virtual tokens as others have it."""
    return ROOT + key if key == PROMPT_KEY else PREFIX + key.removeprefix(PREFIX).removeprefix(ROOT)


def _saved(listed: Sequence[str], keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that are saved whole; PEFT takes each whose name ends so, `pre_classifier` with `classifier`."""
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")[:-1]
        for end, ending in itertools.product(range(1, len(parts) + 1), listed):
            if ".".join(parts[:end]).endswith(ending):
                found[".".join(parts[max(0, end - 1 - ending.count(".")) : end])] = None
    return tuple(found)


def _kind(weight: Weight) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise WeightError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _unpickled(path: Path, allowed: bool) -> dict[str, Weight]:
    if not allowed:
        raise WeightError(
            f"{path} is a pickle, which can run code when opened; save the adapter as {TENSORS}, "
            "or write `allow_pickle: true` in this entry if you trust it"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightError(f"{path}: truncated, or more than tensors is in it ({first})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    return {str(key): Held(value) for key, value in loaded.items()}
