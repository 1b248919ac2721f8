"""Decoding with a cache, one run: ours beside the builder's program, a plain export of PEFT's merge, and torch.

Each program is timed in processes of its own, in turn with the others.
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import adaptc
from benchmarks.builder import build, write_tokenizer
from benchmarks.decoders import PASTS, PROMPTS, Timed, timed
from benchmarks.large import written
from benchmarks.llama import HALF_BILLION, HUNDRED_MILLION, Shape
from benchmarks.process import quiet

ROUNDS = 2
"""How often each program is opened and timed."""
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
        for threads in (1, 2):
            for bits, some in programs.items():
                _table(shape, bits, threads, some)
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


def _programs(work: Path, merged: Path, bits: str) -> dict[str, tuple[str, Path]]:
    """Name -> the kind of decoder (see `opened`), and its file or folder."""
    spec: dict[str, Any] = {
        "base": {"model": str(work / "base"), "task": "causal-lm"},
        "adapt": [{"adapter": str(work / "adapter")}],
    }
    if bits == "int4":
        quantize = {"method": "int4", "target": TARGET, "block_size": BLOCK, "symmetric": True}
        spec |= {"quantize": [quantize], "passes": ["insert", "fold", "quantize"]}
    compiled = adaptc.compile(spec)
    programs: dict[str, tuple[str, Path]] = {}
    for attention in ("plain", "standard", "gqa"):
        path = work / f"{bits}-{attention}.onnx"
        compiled.emit("onnx", path, adapters="folded", cache=True, attention=attention)
        programs[f"adaptc, attention: {attention}"] = "onnx", path
    compiled.emit("genai", work / f"{bits}-genai")
    programs["adaptc, genai (one buffer)"] = "shared", work / f"{bits}-genai" / "model.onnx"
    del compiled
    more: dict[str, object] = {"block_size": BLOCK} if bits == "int4" else {}
    precision = "int4" if bits == "int4" else "fp32"
    built = build(merged, work / f"{bits}-builder", precision, **more)
    programs["builder (one buffer)"] = "shared", built
    if bits == "float32":
        programs["PEFT's merge, exported with transformers' cache"] = "onnx", _exported(merged, work)
        programs["torch, static cache"] = "torch", merged
        programs["torch, static cache, compiled"] = "compiled", merged
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


def _table(shape: Shape, bits: str, threads: int, programs: Mapping[str, tuple[str, Path]]) -> None:
    rounds = {name: list[Timed]() for name in programs}
    for _ in range(ROUNDS):
        for name in random.sample(list(programs), len(programs)):
            rounds[name].append(timed(*programs[name], threads))
    seconds = {
        name: [statistics.median(column) for column in zip(*(r.seconds for r in results), strict=True)]
        for name, results in rounds.items()
    }
    peaks = {name: statistics.median(r.peak for r in results) for name, results in rounds.items()}
    sizes = {name: _size(path) for name, (_, path) in programs.items() if path.is_file()}
    heads = [*(f"a token, past {past}" for past in PASTS), *(f"prompt of {length}" for length in PROMPTS)]
    print(
        f"\n| {shape.nbytes / 4e6:.0f} M, {bits}, LoRA r 16, threads: {threads}; over `{PLAIN}` | "
        f"{' | '.join(heads)} | peak memory | files |\n|---|---|---|---|---|---|---|"
    )
    for name, times in seconds.items():
        ratios = [f"{mine / plain:.2f}" for mine, plain in zip(times, seconds[PLAIN], strict=True)]
        files = f"{sizes[name] / sizes[PLAIN]:.2f}" if name in sizes else ""
        print(f"| {name} | {' | '.join(ratios)} | {peaks[name] / peaks[PLAIN]:.2f} | {files} |", flush=True)
    absolute = [f"{1e3 * value:.1f} ms" for value in seconds[PLAIN]]
    print(
        f"| `{PLAIN}` itself | {' | '.join(absolute)} | {peaks[PLAIN] / 1e6:.0f} MB | "
        f"{sizes[PLAIN] / 1e6:.0f} MB |",
        flush=True,
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
