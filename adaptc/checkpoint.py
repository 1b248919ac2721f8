"""Adapter checkpoints: what an adapter is made of, and PEFT's own files for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptc.errors import WeightError
from adaptc.graph import Graph
from adaptc.method import PeftFormat, options_of
from adaptc.names import matches_any
from adaptc.registry import method_named
from adaptc.weights import Held, Weight, open_safetensors, read_safetensors, sha256_of_files

CONFIG, TENSORS, PICKLE, ORDER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.json",
)
PREFIX = "base_model.model."
BASE_HASH = "base_sha256"


@dataclass(frozen=True)
class AdapterTensor:
    """One trained tensor: its name in the graph, its key in a checkpoint (without PEFT's prefix), its shape."""

    name: str
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterRecord:
    """One entry of a spec as inserted: enough to save, load and swap its tensors without the graph."""

    adapter: str
    entry: int
    method: str
    options: Mapping[str, Any]
    modules: tuple[str, ...]
    transposed: bool
    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterRecord:
        """Read what `asdict` wrote."""
        tensors = tuple(AdapterTensor(t["name"], t["key"], tuple(t["shape"])) for t in data["tensors"])
        return cls(**{**data, "modules": tuple(data["modules"]), "tensors": tensors})

    @property
    def format(self) -> PeftFormat | None:
        """How PEFT spells the method, if it has it."""
        return method_named(self.method).peft


def records_of(graph: Graph) -> list[AdapterRecord]:
    """What was inserted into a graph, an entry at a time, in order."""
    groups: dict[tuple[int, str], list[Any]] = {}
    for adaptation in graph.adaptations:
        groups.setdefault((adaptation.entry, adaptation.method.name), []).append(adaptation)
    found = []
    for (entry, method), group in groups.items():
        tensors = tuple(
            AdapterTensor(name, f"{a.site.module}.{param.key}".lstrip("."), param.shape)
            for a in group
            for name, param in a.params.values()
        )
        modules = tuple(dict.fromkeys(a.site.module for a in group))
        transposed = any(a.site.transposed for a in group)
        options = json.loads(json.dumps(options_of(group[0].declared), default=list))
        found.append(AdapterRecord(group[0].adapter, entry, method, options, modules, transposed, tensors))
    return found


def save(
    records: Sequence[AdapterRecord],
    values: Mapping[str, torch.Tensor],
    directory: Path,
    base: Mapping[str, str],
) -> None:
    """Write adapters as PEFT checkpoints: one in `directory`, or several below it with their order.

    Args:
        records: what was inserted.
        values: the tensors by their names in the graph.
        directory: made if missing.
        base: `name` and `sha256` of the base, kept in the checkpoint.
    """
    groups = group(records)
    if not groups:
        raise WeightError("there is no adapter to save: nothing was inserted")
    names = [""] if len(groups) == 1 else _directories(groups)
    for name, members in zip(names, groups, strict=True):
        target = directory / name
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            PREFIX + t.key: values[t.name].detach().cpu().contiguous().clone()
            for r in members
            for t in r.tensors
        }
        metadata = {"format": "pt", **({BASE_HASH: base["sha256"]} if base.get("sha256") else {})}
        save_file(tensors, target / TENSORS, metadata=metadata)
        (target / CONFIG).write_text(
            json.dumps(_config(members, base.get("name")), indent=2, sort_keys=True) + "\n"
        )
    if len(groups) > 1:
        (directory / ORDER).write_text(json.dumps({"order": names}, indent=2) + "\n")


def group(records: Sequence[AdapterRecord]) -> list[list[AdapterRecord]]:
    """Records that share a checkpoint: a method, and what joins its configuration."""
    groups = [[r] for r in records if r.format is None or not r.format.joins]
    for record in records:
        if record.format is not None and record.format.joins:
            host = next(
                (g for g in groups if g[0].adapter == record.adapter and g[0].format and g[0].format.type),
                None,
            )
            if host is None:
                groups.append([record])
            else:
                host.append(record)
    return groups


def _directories(groups: Sequence[Sequence[AdapterRecord]]) -> list[str]:
    names = [group[0].adapter for group in groups]
    if max(Counter(names).values()) > 1:
        names = [f"{group[0].adapter}-{group[0].method}" for group in groups]
    return [name if names.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(names)]


def _config(group: Sequence[AdapterRecord], base: str | None) -> dict[str, Any]:
    host, joined = group[0], group[1:]
    config: dict[str, Any] = {"base_model_name_or_path": base, "inference_mode": True, "task_type": None}
    if host.format is None or host.format.type is None:
        return config | {
            "peft_type": None,
            "adaptc_method": host.method,
            "adaptc_options": dict(host.options),
            "target_modules": list(host.modules),
        }
    config |= {"peft_type": host.format.type, "target_modules": list(host.modules), **host.format.fixed}
    if host.transposed:
        config["fan_in_fan_out"] = True
    for ours, theirs in host.format.options.items():
        value = host.options[ours]
        config[theirs] = (
            [m for m in host.modules if matches_any(value, m)] if ours in host.format.modules else value
        )
    for record in joined:
        assert record.format is not None
        assert record.format.joins is not None
        config.setdefault(record.format.joins, []).extend(record.modules)
    return config


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as found on disk; tensors are not loaded."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    base_sha256: str | None = None
    saved_modules: tuple[str, ...] = field(default=())

    @property
    def sha256(self) -> str:
        """SHA-256 of its files."""
        return sha256_of_files([p for p in (self.path / n for n in (CONFIG, TENSORS, PICKLE)) if p.is_file()])


def directories(path: Path) -> list[Path]:
    """The checkpoints in a directory, in the order they apply."""
    order = path / ORDER
    if order.is_file():
        return [path / name for name in json.loads(order.read_text())["order"]]
    return [path]


def read(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint's configuration and the shapes of its tensors.

    Raises:
        WeightError: it is missing, truncated, pickled, or not an adapter of a known format.
    """
    if not path.is_dir():
        raise WeightError(
            f"{path}: no such directory; expected an adapter's checkpoint with {CONFIG} and {TENSORS}"
        )
    if not (path / CONFIG).is_file():
        raise WeightError(
            f"{path}: no {CONFIG} there, so this is no adapter's checkpoint (save_pretrained writes one)"
        )
    try:
        config = json.loads((path / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightError(f"{path / CONFIG}: not JSON ({error})") from None
    sha = None
    if (path / TENSORS).is_file():
        sha = (open_safetensors(path / TENSORS).metadata() or {}).get(BASE_HASH)
        tensors: Mapping[str, Weight] = read_safetensors(path / TENSORS)
    elif (path / PICKLE).is_file():
        if not allow_pickle:
            raise WeightError(
                f"{path / PICKLE} is a pickle, which can run code when opened; save the adapter as {TENSORS}, "
                "or write `allow_pickle: true` in this entry if you trust it"
            )
        loaded = torch.load(path / PICKLE, map_location="cpu", weights_only=True)
        tensors = {key: Held(value) for key, value in loaded.items()}
    else:
        raise WeightError(f"{path}: no {TENSORS} there")
    foreign = next((key for key in tensors if not key.startswith(PREFIX)), None)
    if foreign is not None:
        raise WeightError(
            f"{path}: tensor {foreign!r} does not start with {PREFIX!r}: not a checkpoint as PEFT writes it"
        )
    named = {key.removeprefix(PREFIX): weight for key, weight in tensors.items()}
    saved = tuple(m for m in config.get("modules_to_save") or () if any(_below(m, key) for key in named))
    return Checkpoint(path, config, named, sha, saved)


def _below(module: str, key: str) -> bool:
    return f".{key}".find(f".{module}.") >= 0


def assign(checkpoint: Checkpoint, records: Iterable[AdapterRecord]) -> dict[str, Weight]:
    """Match a checkpoint's tensors with inserted parameters: name in the graph -> tensor.

    Raises:
        WeightError: a tensor is missing, left over, mis-shaped, or not finite.
    """
    left = dict(checkpoint.tensors)
    found: dict[str, Weight] = {}
    for record in records:
        for tensor in record.tensors:
            weight = left.pop(tensor.key, None)
            if weight is None:
                raise WeightError(
                    f"{checkpoint.path}: tensor {PREFIX + tensor.key!r} is missing; the file is incomplete"
                )
            if weight.shape != tensor.shape:
                raise WeightError(
                    f"{checkpoint.path}: tensor {PREFIX + tensor.key!r} has shape {list(weight.shape)}, but this base "
                    f"and this configuration need {list(tensor.shape)}; the adapter was trained on another base, "
                    "or its configuration was changed"
                )
            if not torch.isfinite(weight.load()).all():
                raise WeightError(f"{checkpoint.path}: tensor {PREFIX + tensor.key!r} holds NaN or infinity")
            found[tensor.name] = weight
    if left:
        shown = ", ".join(repr(PREFIX + key) for key in list(left)[:3])
        raise WeightError(
            f"{checkpoint.path}: {len(left)} tensors fit no layer this adapter was given: {shown}; "
            "it was trained on another base, or holds something this version does not read"
        )
    return found


def as_json(records: Sequence[AdapterRecord]) -> list[dict[str, Any]]:
    """Records as plain data, for a manifest."""
    return [asdict(record) for record in records]
