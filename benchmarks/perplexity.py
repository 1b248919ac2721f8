"""What int4 costs a decoder: perplexity on text that it was not trained on, beside onnxruntime-genai's builder."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adaptc
from adaptc.emit.onnx.runtime import open_session
from benchmarks.builder import build, write_tokenizer
from benchmarks.process import quiet

TEXT = Path(__file__).parents[1].parent / "shared" / "data" / "tinyshakespeare.txt"
VOCABULARY = 1024
LENGTH = 128
"""Tokens of a row, in training and when it is measured."""
BATCH = 16
WIDTH, HEADS = 256, 4
BLOCK = 32
"""Columns of a weight that share a scale: the builder's smallest that is everybody's."""
CALIBRATION = 32
MINUTES = 4.0
"""How long it is trained, of CPU time."""
INT4: dict[str, Any] = {"target": "all-linear", "block_size": BLOCK}
SCHEMES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int4, to the nearest": {"quantize": [{"method": "int4", **INT4}]},
    "int4, to the nearest, symmetric": {"quantize": [{"method": "int4", "symmetric": True, **INT4}]},
    "GPTQ": {"quantize": [{"method": "gptq", **INT4}]},
    "GPTQ, columns ordered by what they are given": {
        "quantize": [{"method": "gptq", "act_order": True, **INT4}]
    },
    "AWQ": {"quantize": [{"method": "awq", **INT4}]},
    "mixed by budget (error 0.05)": {"quantize": [{"method": "int4", **INT4}], "budget": {"error": 0.05}},
}
BUILDER = {
    "builder, to the nearest, symmetric": {"algo_config": "default"},
    "builder, to the nearest": {"algo_config": "default", "is_symmetric": "false"},
    "builder, k_quant": {"algo_config": "k_quant"},
}
SAME: dict[str, object] = {"block_size": BLOCK, "nodes_to_exclude": "/lm_head/MatMul"}


@dataclass(frozen=True)
class Measured:
    """A program's perplexity with exact products, with rounded activations, and the bytes of its files."""

    exact: float
    rounded: float
    size: int


def perplexity() -> None:
    """Train, make every program, and print the table."""
    quiet()
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    rows = _rows(TEXT.read_text(), work / "base")
    train, held = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    _train(train, work / "base", minutes=MINUTES)
    measured = {name: _ours(work, options, train, held) for name, options in SCHEMES.items()}
    measured |= {name: _builders(work, options, held) for name, options in BUILDER.items()}
    print(
        f"\n| a decoder of {_parameters(work / 'base') / 1e6:.1f} M, {len(held)} rows of {LENGTH} tokens held out | "
        "perplexity | over float32's | activations rounded too | size over float32's |\n|---|---|---|---|---|"
    )
    floats = measured["float32"]
    for name, one in measured.items():
        print(
            f"| {name} | {one.exact:.3f} | {one.exact / floats.exact:.4f} | {one.rounded / floats.exact:.4f} | "
            f"{one.size / floats.size:.2f} |",
            flush=True,
        )
    shutil.rmtree(work)


def _rows(text: str, folder: Path) -> torch.Tensor:
    """The text's tokens in rows, by a tokenizer that is trained on its first nine tenths and saved."""
    tokenizer = write_tokenizer(text[: len(text) * 9 // 10], VOCABULARY, folder)
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def _train(rows: torch.Tensor, folder: Path, minutes: float) -> None:
    """Train a Llama of four layers for some minutes of CPU time of this process, and save it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    start, seconds, done = time.process_time(), 60 * minutes, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 20 * done + 0.02) * (1.02 - done)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = (time.process_time() - start) / seconds
    model.save_pretrained(folder)


def _ours(work: Path, options: dict[str, Any], train: torch.Tensor, held: torch.Tensor) -> Measured:
    spec = {"base": {"model": str(work / "base"), "task": "causal-lm"}, **options}
    picked = random.Random(0).sample(range(len(train)), CALIBRATION)
    rows = [{"input_ids": train[n : n + 1], "attention_mask": torch.ones(1, LENGTH).long()} for n in picked]
    compiled = adaptc.compile(spec, calibration=rows) if options else adaptc.compile(spec)
    values: list[float] = []
    for round_activations in (False, True):
        path = work / f"ours-{round_activations}.onnx"
        compiled.emit("onnx", path, round_activations=round_activations)
        values.append(_perplexity(path, held))
    return Measured(values[0], values[1], _size(path))


def _builders(work: Path, options: dict[str, str], held: torch.Tensor) -> Measured:
    """The same base through `onnxruntime_genai.models.builder`."""
    values: list[float] = []
    for level in (1, 4):
        more = {**SAME, **options, "accuracy_level": level}
        path = build(work / "base", work / f"builder-{level}", "int4", **more)
        values.append(_perplexity(path, held))
    return Measured(values[0], values[1], _size(path))


def _perplexity(path: Path, rows: torch.Tensor) -> float:
    """exp of the mean loss of every token but a row's first, in float64."""
    session = open_session(path)
    total, count = 0.0, 0
    for ids in rows.split(8):
        logits = torch.from_numpy(session.run(["logits"], _feeds(session, ids))[0]).double()
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        count += 1
    return math.exp(total / count)


def _feeds(session: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What a program takes, from an empty past where it has one."""
    rows, length = ids.shape
    given = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.arange(length)[None].repeat(rows, 0),
    }
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name in given:
            feeds[value.name] = given[value.name]
        else:
            feeds[value.name] = np.zeros((rows, HEADS // 2, 0, WIDTH // HEADS), np.float32)
    return feeds


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _parameters(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
