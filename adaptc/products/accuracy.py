"""How many labels products get right, on rows of texts or of tensors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import InputError, Problem, SpecError
from adaptc.inputs import IGNORED, LABELS, InputSpec
from adaptc.products.baseline import Baseline
from adaptc.products.predictor import Predictor
from adaptc.products.product import Product, Tensors
from adaptc.progress.steps import each

LOG = logging.getLogger(__name__)
NORMAL = 1.959964
"""The quantile of the normal distribution that 95 of 100 values are within."""


@dataclass(frozen=True)
class Accuracy:
    """How many labels a product gets right.

    Attributes:
        product: its name.
        right: how many.
        rows: of how many labels.
        low: the lower end of the 95 % interval of its accuracy (Wilson 1927).
        high: the upper end.
    """

    product: str
    right: int
    rows: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The accuracy."""
        return self.right / self.rows


@dataclass(frozen=True)
class LabelledRow:
    """Inputs of a batch of one, and the labels that the largest logits should be at."""

    inputs: Tensors
    labels: torch.Tensor


def accuracies(path: Path, products: Sequence[Product], other: Baseline | None) -> list[Accuracy]:
    """How many labels each product gets right: its largest logit against the label, row by row.

    A row is `{"text": "...", "label": 1}`, with `pair` where there is a second text, and a label by its number or its
    name; or the inputs as lists with `labels`. Labels of -100 are not counted.

    Args:
        path: the .jsonl file.
        products: the products.
        other: what they are compared with; None for nothing.

    Raises:
        SpecError: there is no such file, or no product.
        InputError: a row has other inputs than the products, no label, or one that there is not.
    """
    if not products:
        raise SpecError([Problem("no product here gives logits of rows", file="--rows")])
    rows = _rows(path, products[0])
    calls: dict[str, Callable[[Tensors], Mapping[str, torch.Tensor]]] = {
        product.name: product.open(1) for product in products
    }
    if other is not None:
        calls[other.name] = other.open(1)
    right = dict.fromkeys(calls, 0)
    count = 0
    for row in each(LOG, "counting what is right", rows, "rows"):
        counted = row.labels != IGNORED
        count += int(counted.sum())
        for name, call in calls.items():
            best = _logits(call(row.inputs)).argmax(-1).reshape(-1)
            right[name] += int((best[: len(row.labels)] == row.labels)[counted].sum())
    return [Accuracy(name, number, count, *interval(number, count)) for name, number in right.items()]


def interval(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927)."""
    share, scale = right / rows, NORMAL**2 / rows
    middle = (share + scale / 2) / (1 + scale)
    spread = NORMAL / (1 + scale) * math.sqrt(share * (1 - share) / rows + scale / (4 * rows))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def _logits(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of one row: the output of that name, or else the first."""
    logits = outputs.get("logits", next(iter(outputs.values())))[0]
    if logits.shape[-1] == 1:
        raise InputError("the model gives one number for a row and no classes, so nothing is right or wrong")
    return logits


def _rows(path: Path, product: Product) -> list[LabelledRow]:
    """The rows of a file.

    Raises:
        SpecError: there is no such file.
        InputError: a row is wrong; names its line.
    """
    if not path.is_file():
        message = f"{path}: no such file; expected .jsonl, a row a line"
        raise SpecError([Problem(message, file="--rows")])
    predictor: Predictor | None = None
    rows: list[LabelledRow] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = _read(line, f"{path}:{number}")
        if "text" in row:
            predictor = predictor or Predictor(product.path)
            rows.append(_of_text(row, predictor, f"{path}:{number}"))
        else:
            rows.append(_of_tensors(row, product.inputs(), f"{path}:{number}"))
    if not rows or not any((row.labels != IGNORED).any() for row in rows):
        raise InputError(f"{path}: there is no row with a label")
    return rows


def _read(line: str, place: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f'{place}: expected an object such as {{"text": "fine", "label": 1}}')
    return row  # pyright: ignore[reportUnknownVariableType]


def _of_text(row: Mapping[str, Any], predictor: Predictor, place: str) -> LabelledRow:
    label = row.get("label", row.get(LABELS))
    names = {name: number for number, name in predictor.labels.items()}
    if isinstance(label, str) and label not in names:
        raise InputError(f"{place}: the label {label!r} is none of {', '.join(names)}")
    if label is None or isinstance(label, list):
        raise InputError(f"{place}: a text needs one label: its number, or one of {', '.join(names)}")
    number = names[label] if isinstance(label, str) else int(label)
    return LabelledRow(predictor.encoded(row["text"], row.get("pair")), torch.tensor([number]))


def _of_tensors(row: Mapping[str, Any], inputs: Sequence[InputSpec], place: str) -> LabelledRow:
    if LABELS not in row:
        raise InputError(f"{place}: no labels; a row has text and label, or the inputs and labels")
    lacking = [spec.name for spec in inputs if spec.name not in row]
    if lacking:
        raise InputError(
            f"{place}: {', '.join(lacking)} missing; the products take {', '.join(s.name for s in inputs)}"
        )
    tensors = {
        spec.name: torch.tensor(row[spec.name], dtype=getattr(torch, spec.dtype))[None] for spec in inputs
    }
    return LabelledRow(tensors, torch.tensor(row[LABELS]).reshape(-1))
