"""Read an adapter checkpoint: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from adaptc.checkpoints.config_file import CONFIG, read_config, read_json
from adaptc.checkpoints.key_parts import PREFIX, ROOT, WRAPPERS, in_prefix, taken_out, with_plain_prefix
from adaptc.errors import WeightError
from adaptc.methods.method import METHODS
from adaptc.methods.virtual_tokens import CLASSIFIER_HEADS, PROMPT_KEY
from adaptc.weights import Held, Weight, open_safetensors, read_safetensors, sha256_of_tensors

T = TypeVar("T")
TENSORS = "adapter_model.safetensors"
PICKLE, ORDER = "adapter_model.bin", "adapters.json"
BASE_HASH, BASE_TENSORS = "base_sha256", "base_tensors"
"""Metadata that adaptc writes: the hash of the base it was trained on, and the names of that base's own tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; its tensors are not loaded.

    Attributes:
        path: its directory.
        config: its `adapter_config.json`.
        tensors: key without PEFT's prefix -> tensor.
        base_sha256: hash of the base it was trained on, where adaptc wrote it.
        saved_modules: the modules that were trained whole, and whose tensors it holds.
        base_tensors: the base's own tensors that adaptc wrote for PEFT, by their names.
        joined: keys of its configuration by which other methods join it -> the modules whose tensors of these it holds.
        ignored: keys of its configuration that are read as if they were not there.
        unread: layers of the base that no output of the program depends on; an adapter on them has no effect.
        replaced: modules of which a later adapter holds every parameter, so that this one has no effect on them.
        same: keys of the base's tensors that were saved along and are as this base has them, or have no effect.
        changed: keys of those that differ from this base's -> their names in the base.
        notes: what was read otherwise than it stands in the files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    base_sha256: str | None = None
    saved_modules: tuple[str, ...] = ()
    base_tensors: Mapping[str, Weight] = field(default_factory=dict[str, Weight])
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    same: frozenset[str] = frozenset()
    changed: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()

    @property
    def in_adaptc_format(self) -> bool:
        """Whether it is in adaptc's own format, for methods that PEFT has no format for."""
        return bool(self.config.get("adaptc_method"))

    @property
    def without_effect(self) -> dict[str, str]:
        """The keys of the tensors on layers that no output depends on -> the layer."""
        return {key: layer for key in self.tensors for layer in self.unread if key.startswith(f"{layer}.")}

    @property
    def idle(self) -> frozenset[str]:
        """The keys of the tensors that change nothing: on layers without effect, and of the base as it is."""
        of_later = {key for key in self.tensors for name in self.replaced if key.startswith(f"{name}.")}
        return self.same | of_later | self.without_effect.keys()

    @property
    def sha256(self) -> str:
        """SHA-256 over its configuration and tensors; the bytes of a file vary with the order of its metadata."""
        tensors = sha256_of_tensors(self.tensors.items())
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(f"{config}\n{tensors}".encode()).hexdigest()


def directories(path: Path) -> list[Path]:
    """The directories of the checkpoints at a path, in the order they apply: itself, or those that `ORDER` lists.

    Raises:
        WeightError: the file that holds the order is broken.
    """
    order = path / ORDER
    if not order.is_file():
        return [path]
    names = list_of(str, read_json(order).get("order"))
    if not names or not all(Path(name).name == name for name in names):
        raise WeightError(f'{order}: expected {{"order": [...]}} with the names of the folders beside it')
    return [path / name for name in names]


def saved_together(path: Path) -> dict[str, Path]:
    """The adapters that PEFT's `save_pretrained` wrote into one folder, each that is not `default` in one of its name.

    Returns:
        Name -> folder, that of `default` first; empty where no adapter is in a folder of its own.
    """
    if not path.is_dir() or (path / ORDER).is_file():
        return {}
    below = {
        p.name: p for p in sorted(path.iterdir()) if any((p / name).is_file() for name in (CONFIG, ORDER))
    }
    return {"default": path, **below} if below and (path / CONFIG).is_file() else below


def of_name(path: Path, name: str) -> Path:
    """Where the checkpoint of an adapter is: in a folder of its name below a path, or at the path itself."""
    return saved_together(path).get(name, path)


def why_missing(path: Path) -> str | None:
    """The message that says why there is no checkpoint at a path; None if there is one."""
    if not path.is_dir():
        return f"{path}: no such directory; expected an adapter's checkpoint with {CONFIG} and {TENSORS}"
    together = saved_together(path)
    if together and "default" not in together:
        first = next(iter(together.values()))
        return f"{path}: holds the adapters {', '.join(together)}, each in a folder of its own; name one: {first}"
    if not (path / CONFIG).is_file() and not (path / ORDER).is_file():
        return f"{path}: no {CONFIG} there, so this is no adapter's checkpoint (save_pretrained writes one)"
    return None


def read(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint's configuration and the shapes of its tensors.

    Raises:
        WeightError: it is missing, truncated, pickled, or in no format that adaptc reads.
    """
    absent = why_missing(path)
    if absent or not (path / CONFIG).is_file():
        raise WeightError(absent or f"{path}: no {CONFIG} there")
    config = read_config(path / CONFIG)
    metadata: Mapping[str, str] = {}
    if (path / TENSORS).is_file():
        metadata = open_safetensors(path / TENSORS).metadata() or {}
        tensors: Mapping[str, Weight] = read_safetensors(path / TENSORS)
    elif (path / PICKLE).is_file():
        tensors = _unpickle(path / PICKLE, allow_pickle)
    else:
        raise WeightError(f"{path}: no {TENSORS} there")
    notes = tuple(taken_out(part) for part in WRAPPERS if any(in_prefix(part, key) for key in tensors))
    tensors = {with_plain_prefix(key): weight for key, weight in tensors.items()}
    if PROMPT_KEY in tensors:
        tensors = {_with_prefix(key): weight for key, weight in tensors.items()}
    for key in tensors:
        if not key.startswith(ROOT):
            raise WeightError(
                f"{path}: tensor {key!r} does not start with {PREFIX!r}: not a checkpoint as PEFT writes it"
            )
    named = {key.removeprefix(PREFIX): weight for key, weight in tensors.items()}
    of_base = {key: named.pop(key) for key in metadata.get(BASE_TENSORS, "").split() if key in named}
    endings = config.get("modules_to_save") or (
        sorted(CLASSIFIER_HEADS) if ROOT + PROMPT_KEY in named else []
    )
    saved = _saved_modules(endings, named)
    checkpoint = Checkpoint(path, config, named, metadata.get(BASE_HASH), saved, of_base, notes=notes)
    return _with_joined(checkpoint)


def _with_joined(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose keys are those that the methods which joined it have in a checkpoint of their own."""
    joined: dict[str, tuple[str, ...]] = {}
    tensors = checkpoint.tensors
    for format in (cls.peft for cls in METHODS.values() if cls.peft is not None and cls.peft.joined_as):
        inner = f".{format.joined_as}"
        modules = tuple(dict.fromkeys(key.partition(inner)[0] for key in tensors if inner in key))
        if modules:
            joined[str(format.joins)] = modules
            tensors = {key.replace(inner, "."): tensor for key, tensor in tensors.items()}
    return replace(checkpoint, tensors=tensors, joined=joined)


def _with_prefix(key: str) -> str:
    """A key of a checkpoint with virtual tokens, with the prefix that other checkpoints have."""
    return ROOT + key if key == PROMPT_KEY else PREFIX + key.removeprefix(PREFIX).removeprefix(ROOT)


def _saved_modules(endings: Sequence[str], keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that are saved whole: as in PEFT, each whose name ends so, `pre_classifier` with `classifier`."""
    modules: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")[:-1]
        for end, ending in itertools.product(range(1, len(parts) + 1), endings):
            if ".".join(parts[:end]).endswith(ending):
                modules[".".join(parts[:end])] = None
    return tuple(modules)


def dtype_name(weight: Weight) -> str:
    """The dtype of a weight by torch's name: `float32`."""
    return str(weight.dtype).removeprefix("torch.")


def list_of(kind: type[T], value: object) -> list[T] | None:
    """A JSON value as a list whose items are all of one type; None if it is no such list."""
    if not isinstance(value, list):
        return None
    fits = all(type(item) is kind for item in cast(list[object], value))
    return cast(list[T], value) if fits else None


def _unpickle(path: Path, allowed: bool) -> dict[str, Weight]:
    """The tensors in a pickle.

    Raises:
        WeightError: pickles are not allowed, or it is truncated or holds more than tensors by name.
    """
    if not allowed:
        raise WeightError(
            f"{path} is a pickle, which can run code when opened; save the adapter as {TENSORS}, "
            "or write `allow_pickle: true` in this entry if you trust it"
        )
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightError(f"{path}: truncated, or more than tensors is in it ({first})") from None
    if not isinstance(loaded, dict):
        raise WeightError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    tensors: dict[str, Weight] = {}
    for key, value in cast(dict[object, object], loaded).items():
        if not isinstance(value, torch.Tensor):
            raise WeightError(f"{path}: expected a dict of tensors, but {key!r} is {type(value).__name__}")
        tensors[str(key)] = Held(value)
    return tensors
