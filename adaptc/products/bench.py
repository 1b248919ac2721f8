"""Products side by side: how fast, how large, and on rows with labels how accurate."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.generation.settings import Settings
from adaptc.inputs import InputSpec
from adaptc.ir.example_inputs import example_tensors
from adaptc.products.accuracy import Accuracy, accuracies
from adaptc.products.baseline import Baseline, baseline
from adaptc.products.memory import growth_of
from adaptc.products.product import Product, Tensors, products_at
from adaptc.progress.bars import shown
from adaptc.progress.steps import each

LOG = logging.getLogger(__name__)
WARM, LEAST, MOST = 2, 5, 200
"""Calls before any is timed; calls that are timed, at least and at most."""
NEW, PROMPT = 32, 16
"""Tokens that a product with a cache writes, and those of its prompt."""
Call = Callable[[Tensors], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Timing:
    """How long one product takes for one size of batch.

    Attributes:
        product: its name.
        threads: how many computed.
        batch: rows of the batch; None where its size is fixed.
        length: tokens of a row; None where there is no such dimension.
        median: of a call, in seconds; None where it does not run.
        p95: what 95 of 100 calls are below, in seconds; None where it does not run.
        calls: how many were timed.
        ratio: its median over that of the product that all are compared with; None where either does not run.
        problem: why it does not run at this size; "" where it does.
    """

    product: str
    threads: int
    batch: int | None
    length: int | None
    median: float | None
    p95: float | None
    calls: int
    ratio: float | None
    problem: str = ""


@dataclass(frozen=True)
class Decoding:
    """How fast a product with a cache writes tokens.

    Attributes:
        product: its name.
        first: seconds to the first token of a prompt of 16 tokens.
        tokens_per_second: after that.
        tokens: how many it wrote.
    """

    product: str
    first: float
    tokens_per_second: float | None
    tokens: int


@dataclass(frozen=True)
class Bench:
    """Products side by side.

    Attributes:
        against: the product that ratios compare with.
        bytes: product -> the size of its files.
        memory: product -> by how many bytes a process grows that loads it and calls it once.
        timings: by product and size, those of one size together.
        decodings: of the products with a cache.
        accuracies: on the rows with labels, where there are any.
    """

    against: str
    bytes: Mapping[str, int]
    memory: Mapping[str, int]
    timings: Sequence[Timing]
    decodings: Sequence[Decoding]
    accuracies: Sequence[Accuracy]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench(
    path: str | Path,
    *,
    rows: str | Path | None = None,
    against: str | Path | None = None,
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (16, 128),
    seconds: float = 1.0,
    progress: bool = False,
) -> Bench:
    """Time the products at a path, and measure their memory and accuracy.

    Calls of different products take turns, so that what else the machine does slows all of them alike.

    Args:
        path: a product, or a folder of products.
        rows: a .jsonl file with a label in each row, see `accuracies`.
        against: an ONNX program that all are compared with, or `base` for the base in transformers; if left out the
            product without an adapter, or else the first.
        threads: how many threads compute: one run for each number.
        batches: sizes of the batch.
        lengths: sizes of the second dimension that varies, which tokens are.
        seconds: how long each product is timed at each size, about.
        progress: draw what takes long on standard error.

    Raises:
        SpecError: there is no product at the path, or a number is out of its range.
        AdaptcError: a product cannot be loaded, or the rows do not fit.
    """
    _check(threads, batches, lengths, seconds)
    products = products_at(Path(path))
    with shown(progress):
        called = [product for product in products if not product.cached]
        other = baseline(against, products) if against is not None else None
        reference = other.name if other is not None else _reference(called)
        sizes = _sizes(called[0].inputs(), batches, lengths) if called else []
        timings = [t for count in threads for t in _timed(called, other, reference, sizes, count, seconds)]
        largest = sizes[-1] if sizes else {}
        memory = {
            product.name: growth_of(Path(path), product.name, largest)
            for product in each(LOG, "measuring memory", called, "products")
        }
        right = accuracies(Path(rows), called, other) if rows is not None else []
        return Bench(
            against=reference,
            bytes={product.name: product.bytes for product in products},
            memory=memory,
            timings=timings,
            decodings=[_decoded(product) for product in products if product.cached],
            accuracies=right,
        )


def _check(threads: Sequence[int], batches: Sequence[int], lengths: Sequence[int], seconds: float) -> None:
    given = {"--threads": threads, "--batch": batches, "--length": lengths, "--seconds": [seconds]}
    problems = [
        Problem(f"expected numbers above 0, got {', '.join(map(str, numbers)) or 'none'}", file=option)
        for option, numbers in given.items()
        if not numbers or min(numbers) <= 0
    ]
    if problems:
        raise SpecError(problems)


def _reference(products: Sequence[Product]) -> str:
    """The name of the product that others are compared with: the base in ONNX Runtime, or else the first."""
    plain = [product for product in products if product.adapters == "none"]
    first = next(iter([*plain, *products]), None)
    return first.name if first is not None else ""


def _sizes(
    inputs: Sequence[InputSpec], batches: Sequence[int], lengths: Sequence[int]
) -> list[dict[str, int]]:
    """The sizes of named dimensions: the first takes those of the batch, the second those of the length, others 16."""
    names = list(dict.fromkeys(dim for spec in inputs for dim in spec.dims if isinstance(dim, str)))
    if not names:
        return [{}]
    rest = dict.fromkeys(names[2:], 16)
    if len(names) == 1:
        return [{names[0]: batch} for batch in batches]
    return [{names[0]: batch, names[1]: length, **rest} for batch in batches for length in lengths]


def _timed(
    products: Sequence[Product],
    other: Baseline | None,
    reference: str,
    sizes: Sequence[Mapping[str, int]],
    threads: int,
    seconds: float,
) -> list[Timing]:
    """The timings of all products at all sizes, with one number of threads."""
    timings: list[Timing] = []
    with _torch_threads(threads):
        calls: dict[str, Call] = {product.name: product.open(threads) for product in products}
        if other is not None:
            calls[other.name] = other.open(threads)
        for size in each(LOG, f"timing on {threads} threads", sizes, "sizes"):
            tensors = example_tensors(products[0].inputs(), size)
            measured = _durations(calls, tensors, seconds)
            compared = measured.get(reference)
            whole = statistics.median(compared) if isinstance(compared, list) else None
            timings += [_timing(name, threads, size, got, whole) for name, got in measured.items()]
    return timings


def _timing(
    name: str, threads: int, size: Mapping[str, int], durations: list[float] | str, whole: float | None
) -> Timing:
    batch, length = [*size.values(), None, None][:2]
    if isinstance(durations, str):
        return Timing(name, threads, batch, length, None, None, 0, None, durations)
    median = statistics.median(durations)
    p95 = sorted(durations)[min(len(durations) - 1, int(0.95 * len(durations)))]
    return Timing(
        name, threads, batch, length, median, p95, len(durations), median / whole if whole else None
    )


def _durations(calls: Mapping[str, Call], tensors: Tensors, seconds: float) -> dict[str, list[float] | str]:
    """Name -> the seconds of each call, or why it does not run. The calls of all take turns."""
    durations: dict[str, list[float]] = {name: [] for name in calls}
    problems: dict[str, str] = {}
    for name, call in calls.items():
        try:
            for _ in range(WARM):
                call(tensors)
        except Exception as error:  # whatever a runtime raises
            problems[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    running = {name: call for name, call in calls.items() if name not in problems}
    start = time.perf_counter()
    for number in range(MOST):
        if number >= LEAST and time.perf_counter() - start > seconds * len(running):
            break
        for name, call in running.items():
            began = time.perf_counter()
            call(tensors)
            durations[name].append(time.perf_counter() - began)
    return {name: problems.get(name, durations[name]) for name in calls}


@contextmanager
def _torch_threads(count: int) -> Generator[None]:
    """Let torch compute with so many threads inside this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decoded(product: Product) -> Decoding:
    """How fast a product with a cache writes tokens that it takes the likeliest of.

    Raises:
        AdaptcError: it does not run.
    """
    from adaptc.generation.genai import GenaiModel
    from adaptc.generation.onnx import OnnxDecoder

    decoder = GenaiModel(product.path) if product.format == "genai" else OnnxDecoder(product.path)
    prompt = [3 + number for number in range(PROMPT)]
    start, times = time.perf_counter(), list[float]()
    for _ in decoder.stream(prompt, Settings(max_new_tokens=NEW, temperature=0.0), seed=0):
        times.append(time.perf_counter())
    if not times:
        raise AdaptcError(f"{product.path}: it writes no token")
    rest = times[-1] - times[0]
    return Decoding(
        product.name, times[0] - start, (len(times) - 1) / rest if len(times) > 1 else None, len(times)
    )
