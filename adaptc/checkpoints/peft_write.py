"""Write PEFT checkpoints: an adapter's tensors and configuration, as PEFT itself writes them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from adaptc.checkpoints.adapter import BASE_HASH, BASE_TENSORS, CONFIG, ORDER, TENSORS
from adaptc.checkpoints.asked_for import spelled
from adaptc.checkpoints.grouping import biases, group
from adaptc.checkpoints.key_parts import ROOT
from adaptc.checkpoints.records import AdapterRecord, AdapterTensor
from adaptc.checkpoints.tied import ON_ALIAS
from adaptc.errors import WeightError
from adaptc.methods.method import options_of
from adaptc.methods.peft_format import TIES, PeftFormat
from adaptc.patterns import matches_any

TASKS: Mapping[str, str] = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "feature-extraction": "FEATURE_EXTRACTION",
}
"""A base's task -> PEFT's `task_type`; PEFT ignores virtual tokens without one."""
CLASSIFYING = frozenset({"SEQ_CLS", "TOKEN_CLS"})
"""The task types whose head PEFT expects in a checkpoint of virtual tokens."""


def save(
    records: Sequence[AdapterRecord],
    values: Mapping[str, torch.Tensor],
    directory: Path,
    base: Mapping[str, str],
) -> None:
    """Write adapters as PEFT checkpoints: one in `directory`, or several below it with their order.

    Args:
        records: the adapters.
        values: the tensors by their names in the graph.
        directory: made if missing.
        base: `name`, `sha256` and `task` of the base, which are written into the checkpoint.

    Raises:
        WeightError: there is no adapter.
        OSError: the disk cannot take the files.
    """
    groups = group(records)
    if not groups:
        raise WeightError("there is no adapter to save: nothing was inserted")
    names = [""] if len(groups) == 1 else _directories(groups)
    for name, members in zip(names, groups, strict=True):
        target = directory / name
        target.mkdir(parents=True, exist_ok=True)
        format = members[0].format
        bare = format is not None and format.bare
        tensors = {
            spelled(_joined(key, r.format if r is not members[0] else None), bare): _as_written(
                values[t.name], t
            )
            for r in members
            for t in r.stored
            for key in (t.key, *t.copies)
        }
        metadata = {"format": "pt", **({BASE_HASH: base["sha256"]} if base.get("sha256") else {})}
        if TASKS.get(base.get("task", "")) in CLASSIFYING and members[0].heads:
            heads = [name for name in members[0].heads if ROOT + name not in tensors]
            tensors |= {ROOT + name: values[name].detach().contiguous().clone() for name in heads}
            metadata[BASE_TENSORS] = " ".join(heads)
        try:
            cast(Any, safetensors).save_file(tensors, target / TENSORS, metadata=metadata)
        except SafetensorError as error:  # only the disk can fail here
            raise OSError(str(error)) from error
        (target / CONFIG).write_text(json.dumps(_config(members, base), indent=2, sort_keys=True) + "\n")
    if len(groups) > 1:
        (directory / ORDER).write_text(json.dumps({"order": names}, indent=2) + "\n")


def _joined(key: str, format: PeftFormat[Any] | None) -> str:
    """The key of a tensor, of a method that joins another's checkpoint where its format is given."""
    module, dot, leaf = key.rpartition(".")
    return f"{module}{dot}{format.joined_as}{leaf}" if format is not None else key


def _as_written(value: torch.Tensor, tensor: AdapterTensor) -> torch.Tensor:
    """A tensor as it is written: on the CPU; indices that fit are int32, as PEFT has them."""
    narrow = tensor.below is not None and tensor.below <= 2**31
    return value.detach().to("cpu", torch.int32 if narrow else value.dtype).contiguous().clone()


def _directories(groups: Sequence[Sequence[AdapterRecord]]) -> list[str]:
    """A name for each checkpoint: the adapter's, with the method's and a number where names are equal."""
    names = [group[0].adapter for group in groups]
    if max(Counter(names).values()) > 1:
        names = [f"{group[0].adapter}-{group[0].method}" for group in groups]
    return [name if names.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(names)]


def _config(group: Sequence[AdapterRecord], base: Mapping[str, str]) -> dict[str, Any]:
    """The `adapter_config.json` of a checkpoint: of the first record, which the others join."""
    host, joined = group[0], group[1:]
    config: dict[str, Any] = {
        "base_model_name_or_path": base.get("name"),
        "inference_mode": True,
        "task_type": None,
    }
    if host.format is None or host.format.type is None:
        return config | {
            "peft_type": None,
            "adaptc_method": host.method,
            "adaptc_options": dict(host.options),
            "target_modules": list(host.patterns),
            **({ON_ALIAS: "share"} if host.tied else {}),
        }
    config |= {"peft_type": host.format.type, **_fixed_keys(host.format.fixed), **host.format.unused}
    config |= host.sizes
    if host.format.bare:
        config["task_type"] = TASKS.get(base.get("task", ""))
    else:
        config["target_modules"] = _targets(host)
    if host.parameters:
        config["target_parameters"] = list(host.parameters)
    if host.format.ties and any(r.tied and r.format is not None and not r.format.tied for r in group):
        config[TIES] = True
    if host.transposed:
        config["fan_in_fan_out"] = True
    options = host.format.write(options_of(host.instance))
    for ours, theirs in host.format.options.items():
        value = options[ours]
        config[theirs] = (
            [m for m in host.modules if matches_any(value, m)] if ours in host.format.modules else value
        )
    for record in joined if not host.format.bare else ():
        assert record.format is not None
        assert record.format.joins is not None
        by_bias = biases(host, record)
        modules = [module for module in record.modules if module not in by_bias]
        if modules:
            key, options = record.format.joins, options_of(record.instance)
            config[key] = record.format.join(config.get(key), modules, options)
    return config


def _fixed_keys(fixed: Mapping[str, object]) -> dict[str, object]:
    """The keys with a fixed value, without those of adaptc that are false, which PEFT does not know."""
    return {key: value for key, value in fixed.items() if value or not key.startswith("adaptc_")}


def _targets(record: AdapterRecord) -> list[str] | str:
    """The value of `target_modules`: a list of names, or a regex where a list would match other modules too."""
    if not record.ambiguous:
        return list(record.modules)
    return "(" + "|".join(re.escape(module) for module in record.modules) + ")"
