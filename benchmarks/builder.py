"""onnxruntime-genai's model builder, as a person runs it, and a tokenizer, without which it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

START, END = "<s>", "</s>"


def build(base: Path, folder: Path, precision: str, **options: object) -> Path:
    """Run the builder for the CPU.

    Args:
        base: a Hugging Face directory with a tokenizer.
        folder: where the program goes.
        precision: `fp32` or `int4`.
        options: its `--extra_options`.

    Returns:
        The program.

    Raises:
        RuntimeError: it failed; holds what it said last.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(base), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder.parent / "cache")]
    if options:
        command += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the builder failed:\n{done.stderr[-3000:]}")
    return folder / "model.onnx"


def write_tokenizer(text: str, words: int, folder: Path) -> Any:
    """Train a tokenizer of `words` words on a text, save it as transformers reads it, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=[START, END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END)
    fast.save_pretrained(folder)
    return tokenizer
