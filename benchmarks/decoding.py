"""Decoding with a cache, one run: ours beside the builder's program, a plain export of PEFT's merge, and torch.

On one thread the time is that of the processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import adaptc
from benchmarks.builder import build, write_tokenizer
from benchmarks.decoders import Decoder, OnnxDecoder, TorchDecoder
from benchmarks.large import written
from benchmarks.llama import HALF_BILLION, HUNDRED_MILLION, Shape
from benchmarks.process import quiet

PASTS, PROMPTS = (128, 1024), (128, 512)
STEPS, PREFILLS = 11, 3
"""Of each order in which the programs are opened: one that is opened later may lie better in memory, worth a tenth."""
BLOCK = 32
"""Columns of a weight that share a scale, the builder's default."""
TARGET = ["all-linear", "lm_head"]
"""The builder's int4 has the last layer in four bits too."""
PLAIN = "adaptc, attention: plain"


def decoding(shape: Shape = HUNDRED_MILLION) -> None:
    """Print the tables: float32 and int4, on one thread, then on two."""
    quiet()
    with written(shape, 16) as work:
        if work is None:
            return
        write_tokenizer(Path(__file__).read_text(), 600, work / "base")
        merged = _merged(work)
        programs = {bits: _programs(work, merged, bits) for bits in ("float32", "int4")}
        peaks = {
            bits: {name: _peak(path, shared) for name, (path, shared) in some.items()}
            for bits, some in programs.items()
        }
        for threads in (1, 2):
            for bits, some in programs.items():
                _table(shape, bits, threads, some, peaks[bits], merged)
        shutil.rmtree(merged)


def decoding_half_billion() -> None:
    """The same for half a billion parameters."""
    decoding(HALF_BILLION)


def _merged(work: Path) -> Path:
    """PEFT's merge of the adapter, saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(work / "base")
    folder = work / "merged"
    merged: Any = PeftModel.from_pretrained(model, str(work / "adapter")).merge_and_unload()
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(folder)
    return folder


def _programs(work: Path, merged: Path, bits: str) -> dict[str, tuple[Path, bool]]:
    """Name -> file, and whether past and present are one buffer in it."""
    spec: dict[str, Any] = {
        "base": {"model": str(work / "base"), "task": "causal-lm"},
        "adapt": [{"adapter": str(work / "adapter")}],
    }
    if bits == "int4":
        quantize = {"method": "int4", "target": TARGET, "block_size": BLOCK, "symmetric": True}
        spec |= {"quantize": [quantize], "passes": ["insert", "fold", "quantize"]}
    compiled = adaptc.compile(spec)
    programs: dict[str, tuple[Path, bool]] = {}
    for attention in ("plain", "standard", "gqa"):
        path = work / f"{bits}-{attention}.onnx"
        compiled.emit("onnx", path, adapters="folded", cache=True, attention=attention)
        programs[f"adaptc, attention: {attention}"] = path, False
    compiled.emit("genai", work / f"{bits}-genai")
    programs["adaptc, genai (one buffer)"] = work / f"{bits}-genai" / "model.onnx", True
    del compiled
    more: dict[str, object] = {"block_size": BLOCK} if bits == "int4" else {}
    precision = "int4" if bits == "int4" else "fp32"
    programs["builder (one buffer)"] = build(merged, work / f"{bits}-builder", precision, **more), True
    if bits == "float32":
        programs["PEFT's merge, exported with transformers' cache"] = _exported(merged, work), False
    return programs


class _WithCache(torch.nn.Module):
    """A decoder whose keys and values are arguments and results, as people write it to export one."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.layers = model, model.config.num_hidden_layers

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: list[Any]) -> Any:
        """Logits, and the keys and values of each layer."""
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        made = output.past_key_values.layers
        return output.logits, *(tensor for layer in made for tensor in (layer.keys, layer.values))


def _exported(merged: Path, work: Path) -> Path:
    """What torch's own exporter makes of PEFT's merged model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(merged).eval()
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, config.num_key_value_heads, 5, size) for _ in range(2 * config.num_hidden_layers)]
    new, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    free = torch.export.Dim.DYNAMIC
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    path = work / "exported.onnx"
    torch.onnx.export(
        _WithCache(model),
        (new, mask, new.cumsum(1), past),
        path,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
        dynamic_shapes=(
            {0: free, 1: free},
            {0: free, 1: free},
            {0: free, 1: free},
            [{0: free, 2: free}] * len(past),
        ),
        dynamo=True,
        verbose=False,
    )
    return path


def _table(
    shape: Shape,
    bits: str,
    threads: int,
    programs: Mapping[str, tuple[Path, bool]],
    peaks: Mapping[str, int],
    merged: Path,
) -> None:
    timings = [
        _times(
            programs if order else dict(reversed(programs.items())),
            threads,
            merged if bits == "float32" else None,
        )
        for order in (1, 0)
    ]
    columns = [
        {name: statistics.mean([t[i][name] for t in timings]) for name in timings[0][i]} for i in range(4)
    ]
    heads = [*(f"a token, past {past}" for past in PASTS), *(f"prompt of {length}" for length in PROMPTS)]
    millions = shape.nbytes / 4e6
    print(
        f"\n| {millions:.0f} M, {bits}, LoRA r 16, threads: {threads}; over `{PLAIN}` | {' | '.join(heads)} | "
        "peak memory | files |\n|---|---|---|---|---|---|---|"
    )
    for name in columns[0]:
        ratios = [f"{times[name] / times[PLAIN]:.2f}" for times in columns]
        memory, files = "", ""
        if name in programs:
            memory = f"{peaks[name] / peaks[PLAIN]:.2f}"
            files = f"{_size(programs[name][0]) / _size(programs[PLAIN][0]):.2f}"
        print(f"| {name} | {' | '.join(ratios)} | {memory} | {files} |", flush=True)
    absolute = [f"{1e3 * times[PLAIN]:.1f} ms" for times in columns]
    print(
        f"| `{PLAIN}` itself | {' | '.join(absolute)} | {peaks[PLAIN] / 1e6:.0f} MB | "
        f"{_size(programs[PLAIN][0]) / 1e6:.0f} MB |",
        flush=True,
    )


def _times(
    programs: Mapping[str, tuple[Path, bool]], threads: int, merged: Path | None
) -> list[dict[str, float]]:
    """The median times of a token behind each past, and of each prompt; torch's too, of a merged model."""
    from transformers import AutoModelForCausalLM

    decoders: dict[str, Decoder] = {
        name: OnnxDecoder(path, shared, threads) for name, (path, shared) in programs.items()
    }
    if merged is not None:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(merged).eval()
        decoders["torch, static cache"] = TorchDecoder(model, compiled=False)
        decoders["torch, static cache, compiled"] = TorchDecoder(model, compiled=True)
    clock = time.process_time if threads == 1 else time.perf_counter
    times: list[dict[str, float]] = []
    for past in PASTS:
        for decoder in decoders.values():
            decoder.prefill(past)
        times.append(_medians({name: decoder.step for name, decoder in decoders.items()}, STEPS, clock))
    for length in PROMPTS:
        calls = {name: partial(decoder.prefill, length) for name, decoder in decoders.items()}
        times.append(_medians(calls, PREFILLS, clock))
    return times


def _medians(
    calls: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    times = {name: list[float]() for name in calls}
    for number in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            start = clock()
            calls[name]()
            if number > 0:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _peak(path: Path, shared: bool) -> int:
    """Bytes that a process needs which takes a prompt of 512 tokens and some tokens more."""
    command = [sys.executable, "-m", "benchmarks.decoders", str(path), str(shared)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
