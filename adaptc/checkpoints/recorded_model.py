"""The model of transformers that a module was made of, made again without tensors: whose names the tables are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adaptc.optional import MissingPackageError, optional


def record_of(model: Any) -> dict[str, Any]:
    """What is needed to make a model of transformers again: `class` and `config`; nothing for one of custom code."""
    kind: Any = model.__class__
    if not kind.__module__.startswith("transformers."):
        return {}
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {"class": kind.__name__, "config": config}


def recorded_model(record: Mapping[str, Any]) -> nn.Module | None:
    """The model of a record, on the meta device; None where there is no record, or transformers is not installed."""
    if not record:
        return None
    try:
        transformers: Any = optional("transformers")
    except MissingPackageError:
        return None
    kind: Any = getattr(transformers, record["class"])
    with torch.device("meta"):
        return kind(kind.config_class.from_dict(dict(record["config"])))
