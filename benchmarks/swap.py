"""Adapters that are swapped in ONNX Runtime: what they cost at each rank, a swap, and a hundred on one session."""

from __future__ import annotations

import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adaptc
from adaptc.emit.onnx.adapter_file import write_adapter
from adaptc.emit.onnx.runtime import open_session
from benchmarks.process import quiet

ROUNDS = 30
RANKS = (0, 8, 64)
MANY = 100
LENGTHS = (1, 128)


def swap() -> None:
    """Print the tables."""
    quiet()
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    _save_base(work / "base")
    print(
        "\n| all 42 linear layers, over the program without adapters | 1 token | 128 tokens |\n|---|---|---|"
    )
    lines: list[str] = []
    for bits in ("float32", "int4"):
        lines.append(_one(work, bits))
    lines.append(_classifier(work))
    print(
        "\nMedians of CPU time of interleaved runs on one thread that does not spin; a Llama of 6 layers of 512 "
        "with random weights, no cache.\n\n" + "\n".join(lines)
    )
    shutil.rmtree(work)


def _save_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _one(work: Path, bits: str) -> str:
    """Print the rows of a base, and give the lines on swaps and on many adapters."""
    spec: dict[str, Any] = {
        "base": {"model": str(work / "base"), "task": "causal-lm"},
        "adapters": {"one": [{"method": "lora", "target": "all-linear", "r": 8}]},
    }
    if bits != "float32":
        spec["quantize"] = [{"method": bits, "target": "all-linear"}]
    compiled = adaptc.compile(spec)
    compiled.emit("onnx", work / f"{bits}-none.onnx", adapters="none")
    start = time.perf_counter()
    compiled.emit("onnx", work / f"{bits}-swap.onnx", adapters="swap")
    emitted = time.perf_counter() - start
    compiled.alternatives["one"].emit("onnx", work / f"{bits}-live.onnx", adapters="live")
    sessions = {
        "without adapters": open_session(work / f"{bits}-none.onnx"),
        "LoRA of rank 8 as constants (`live`)": open_session(work / f"{bits}-live.onnx"),
        "swap": open_session(work / f"{bits}-swap.onnx"),
    }
    files = {
        rank: _adapter(sessions["swap"], rank, work / f"{bits}-{rank}.onnx_adapter", rank)
        for rank in RANKS[1:]
    }
    kept = {rank: _options(path) for rank, path in files.items()}
    calls: dict[str, tuple[Any, Any]] = {
        "without adapters": (sessions["without adapters"], None),
        "LoRA of rank 8 as constants (`live`)": (sessions["LoRA of rank 8 as constants (`live`)"], None),
        "swap, rank 0": (sessions["swap"], None),
    }
    calls |= {f"swap, rank {rank}": (sessions["swap"], options) for rank, (options, _) in kept.items()}
    one, many = (_latencies(calls, length) for length in LENGTHS)
    for name in list(calls)[1:]:
        print(f"| {bits}: {name} | {one[name]:.2f} | {many[name]:.2f} |", flush=True)
    return f"{bits}: compiled and proved in {emitted:.0f} s. " + _many(
        work, bits, sessions["swap"], _feeds(1)
    )


def _adapter(session: Any, rank: int, path: Path, seed: int) -> Path:
    """A random adapter of a rank for a program."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for value in session.get_overridable_initializers():
        shape = [rank if isinstance(size, str) else size for size in value.shape]
        tensors[value.name] = 0.02 * torch.randn(shape, generator=generator)
    write_adapter(path, tensors, "0" * 64)
    return path


def _options(path: Path) -> tuple[Any, Any]:
    """The options of a run with an adapter, and the adapter, which must live as long as they."""
    import onnxruntime

    untyped: Any = onnxruntime
    adapter, options = untyped.LoraAdapter(), untyped.RunOptions()
    adapter.Load(str(path))
    options.add_active_adapter(adapter)
    return options, adapter


def _feeds(length: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, 2000, (1, length))
    mask, positions = np.ones((1, length), np.int64), np.arange(length)[None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _latencies(calls: dict[str, tuple[Any, Any]], length: int) -> dict[str, float]:
    """The median latency of each call over the first's."""
    feeds, times = _feeds(length), {name: list[float]() for name in calls}
    for number in range(ROUNDS + 2):
        for name in random.sample(list(calls), len(calls)):
            session, options = calls[name]
            seconds = _timed(lambda s=session, o=options: s.run(None, feeds, o))
            if number > 1:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: value / medians["without adapters"] for name, value in medians.items()}


def _timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _classifier(work: Path) -> str:
    """The line on many adapters of an encoder that classifies, each with a head of its own, on one session."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    BertForSequenceClassification(BertConfig(vocab_size=2000, **size)).save_pretrained(work / "classifier")
    entries = [
        {"method": "lora", "target": ["*.query", "*.value"]},
        {"method": "full", "target": "classifier"},
    ]
    compiled = adaptc.compile(
        {
            "base": {"model": str(work / "classifier"), "task": "sequence-classification"},
            "adapters": {"any": entries},
        }
    )
    compiled.emit("onnx", work / "classifier.onnx", adapters="swap")
    ids = np.random.default_rng(0).integers(3, 2000, (8, 64))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return "A classifier, 8 rows of 64 tokens, each adapter with its head: " + _many(
        work, "classifier", open_session(work / "classifier.onnx"), feeds
    )


def _many(work: Path, label: str, session: Any, feeds: dict[str, Any]) -> str:
    """The line on a swap, and on many adapters of rank 8 on one session."""
    paths = [_adapter(session, 8, work / f"{label}-many-{n}.onnx_adapter", n) for n in range(MANY)]
    size = paths[0].stat().st_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loads: list[float] = []
    loaded: list[tuple[Any, Any]] = []
    for path in paths:
        loads.append(_timed(lambda p=path: loaded.append(_options(p))))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    same = [_timed(lambda: session.run(None, feeds, loaded[0][0])) for _ in range(MANY)]
    swapped = [_timed(lambda o=options: session.run(None, feeds, o)) for options, _ in loaded]
    return (
        f"Loading an adapter of rank 8 ({size / 1e6:.1f} MB): {1e3 * statistics.median(loads):.2f} ms. A run with "
        f"another adapter than the run before takes {statistics.median(swapped) / statistics.median(same):.2f} of one "
        f"with the same. {MANY} adapters on one session: peak memory grows by "
        f"{grown / MANY / size:.2f} of a file for each."
    )
