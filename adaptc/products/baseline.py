"""What products are compared with, besides one another: another ONNX program, or the base in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adaptc.errors import Problem, SpecError
from adaptc.generation.onnx import base_in
from adaptc.products.product import Product, Tensors, called, products_at

BASE = "base"
"""What names the base itself."""


@dataclass(frozen=True)
class Baseline:
    """What products are compared with.

    Attributes:
        name: how tables call it.
        open: loads it, with a number of threads, as `Product.open` does.
    """

    name: str
    open: Callable[[int], Callable[[Tensors], Mapping[str, torch.Tensor]]]


def baseline(against: str | Path, products: Sequence[Product]) -> Baseline:
    """What `--against` names.

    Args:
        against: a file, or `base`.
        products: what is compared, whose base it may be.

    Raises:
        SpecError: there is no such file, or the base is not a Hugging Face model.
    """
    if str(against) != BASE:
        (product,) = products_at(Path(against))
        return Baseline(str(against), product.open)
    product = products[0]
    task = product.base.get("task")
    if product.base.get("model") is None or task is None:
        message = "the base is no Hugging Face model, so it is not loaded"
        advice = "emit it, {format: onnx, path: base.onnx, adapters: none}, and name that file"
        raise SpecError([Problem(message, file="--against", notes=(advice,))])
    return Baseline("base in transformers", lambda threads: called(_base_model(product, str(task))))


def _base_model(product: Product, task: str) -> torch.nn.Module:
    from adaptc.tracing.huggingface.model import read_pretrained

    directory = base_in(product.entry, product.path)
    pretrained = read_pretrained(directory, task, trust=False, overrides=product.base.get("config", {}))
    return pretrained.auto.from_pretrained(directory, config=pretrained.config)
