"""Training steps of other methods than LoRA on MiniLM, each beside PEFT's: time and memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import adaptc
from benchmarks.field import minilm
from benchmarks.minilm import TARGETS, line, memory, side_by_side
from benchmarks.process import batch, quiet, train_step

VIRTUAL = {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}
CONFIGURATIONS = {
    "AdaLoRA, init_r 12": ("AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": 1000}),
    "OFT, blocks of 32": ("OFTConfig", {"oft_block_size": 32}),
    "OFT, the exact inverse": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "VeRA, r 256": ("VeraConfig", {"r": 256}),
    "LoHa, r 8": ("LoHaConfig", {"r": 8}),
    "prefix, 20 tokens": ("PrefixTuningConfig", VIRTUAL),
    "prompt, 20 tokens": ("PromptTuningConfig", VIRTUAL),
}


def steps() -> None:
    """Print the table."""
    import peft
    import transformers

    quiet()
    print("\n| MiniLM, on every linear, batch 16 x 64 | adaptc / PEFT | adaptc | PEFT |\n|---|---|---|---|")
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    for number, (what, (cls, options)) in enumerate(CONFIGURATIONS.items()):
        adapter = work / str(number)
        model = transformers.AutoModel.from_pretrained(minilm())
        targets = {} if options is VIRTUAL else {"target_modules": TARGETS}
        config = getattr(peft, cls)(**targets, **options)
        theirs = peft.get_peft_model(model, config)
        theirs.save_pretrained(str(adapter))
        ours = adaptc.compile({"base": {"model": str(minilm())}, "adapt": [{"adapter": str(adapter)}]}).module
        tensors = batch(16, 64)
        line(f"{what}: training step", *side_by_side(train_step(ours, tensors), train_step(theirs, tensors)))
        memory(f"{what}: peak memory above the imports", minilm(), adapter, "eager")
    shutil.rmtree(work)
