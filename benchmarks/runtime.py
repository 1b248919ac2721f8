"""Quantized MiniLM in ONNX Runtime: latency, size and error beside the float program and its own quantizers."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adaptc
from adaptc.emit.onnx.runtime import open_session
from benchmarks.field import SST2, minilm
from benchmarks.process import quiet

ROUNDS = 60
CALIBRATION, HELD = 64, 100
"""Sentences that layers are calibrated on, and others that the error is measured on."""
OURS: dict[str, dict[str, Any]] = {
    "int8, a scale a row": {"method": "int8"},
    "int8, blocks of 128": {"method": "int8", "block_size": 128},
    "dynamic int8": {"method": "dynamic-int8"},
    "int4, blocks of 32": {"method": "int4", "block_size": 32},
    "int4, blocks of 128": {"method": "int4", "block_size": 128},
    "int4, blocks of 128, clip": {"method": "int4", "block_size": 128, "clip": True},
    "int4, blocks of 32, symmetric": {"method": "int4", "block_size": 32, "symmetric": True},
    "GPTQ, 4 bits, blocks of 32": {"method": "gptq", "block_size": 32},
    "GPTQ, 4 bits, blocks of 128": {"method": "gptq", "block_size": 128},
    "AWQ, 4 bits, blocks of 128": {"method": "awq", "block_size": 128},
    "int2, blocks of 32, clip": {"method": "int2", "block_size": 32, "clip": True},
    "nf4": {"method": "nf4"},
}


def runtime() -> None:
    """Print the table."""
    quiet()
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    rows = sentences()
    spec = {"base": {"model": str(minilm())}}
    adaptc.compile(spec).emit("onnx", work / "float.onnx")
    programs: dict[str, Path] = {"float32": work / "float.onnx"}
    for number, (name, options) in enumerate(OURS.items()):
        quantize = [{"target": "all-linear", **options}]
        made = adaptc.compile({**spec, "quantize": quantize}, calibration=rows[:CALIBRATION])
        programs[name] = work / f"{number}.onnx"
        made.emit("onnx", programs[name])
    programs |= _theirs(work)
    sessions = {name: open_session(path) for name, path in programs.items()}
    wanted = [sessions["float32"].run(None, _feeds(row))[0] for row in rows[CALIBRATION:]]
    size = programs["float32"].stat().st_size
    print(
        "\n| MiniLM, all linear layers | latency, 1 token | 128 tokens | file | error |\n|---|---|---|---|---|"
    )
    one, many = (_latencies(sessions, _example(length)) for length in (1, 128))
    for name, session in sessions.items():
        error = _error(session, rows[CALIBRATION:], wanted)
        share = programs[name].stat().st_size / size
        print(f"| {name} | {one[name]:.2f} | {many[name]:.2f} | {share:.2f} | {error:.3f} |", flush=True)
    print(
        "\nLatency and file over float32's, medians of interleaved runs on one thread; error: relative, of the last "
        "hidden state, on sentences that no layer was calibrated on. The embeddings stay in float32."
    )
    shutil.rmtree(work)


def _theirs(work: Path) -> dict[str, Path]:
    """ONNX Runtime's own quantizers on the same float program, its weights transposed first: they want constants."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(work / "constants.onnx")
    onnxruntime.InferenceSession(str(work / "float.onnx"), options, providers=["CPUExecutionProvider"])
    found = {}
    for bits, block, level in ((4, 32, None), (4, 32, 4), (4, 128, None), (4, 128, 4), (8, 128, 4)):
        model = onnx.load(work / "constants.onnx")
        made = MatMulNBitsQuantizer(
            model, bits=bits, block_size=block, is_symmetric=False, accuracy_level=level
        )
        made.process()
        name = f"ONNX Runtime's MatMulNBitsQuantizer, {bits} bits, blocks of {block}, level {level}"
        found[name] = work / f"theirs-{bits}-{block}-{level}.onnx"
        onnx.save(made.model.model, found[name])  # type: ignore[union-attr]
    name = "ONNX Runtime's quantize_dynamic, int8"
    found[name] = work / "theirs-dynamic.onnx"
    quantize_dynamic(
        work / "constants.onnx",
        found[name],
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    return found


def sentences() -> list[dict[str, torch.Tensor]]:
    """Sentences as the model takes them: real ones where they are, else random tokens."""
    import transformers

    if not (SST2 / "train.tsv").is_file():
        generator = random.Random(0)
        lengths = [generator.randint(8, 30) for _ in range(CALIBRATION + HELD)]
        return [_example(length, seed) for seed, length in enumerate(lengths)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    lines = (SST2 / "train.tsv").read_text().splitlines()[: CALIBRATION + HELD]
    texts = (line.rpartition("\t")[0] for line in lines)
    return [{name: torch.tensor([ids]) for name, ids in tokenizer(text).items()} for text in texts]


def _example(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (1, length), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def _feeds(row: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in row.items()}


def _error(session: Any, rows: list[dict[str, torch.Tensor]], wanted: list[Any]) -> float:
    got = [session.run(None, _feeds(row))[0] for row in rows]
    off = sum(float(np.square(a - b).sum()) for a, b in zip(got, wanted, strict=True))
    return (off / sum(float(np.square(b).sum()) for b in wanted)) ** 0.5


def _latencies(sessions: Mapping[str, Any], row: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Median over float32's, of runs in turn."""
    feeds, taken = _feeds(row), {name: list[float]() for name in sessions}
    calls: dict[str, Callable[[], Any]] = {
        name: lambda session=session: session.run(None, feeds) for name, session in sessions.items()
    }
    order = list(calls)
    for _ in range(ROUNDS + 2):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[2:]) for name, times in taken.items()}
    return {name: value / medians["float32"] for name, value in medians.items()}
