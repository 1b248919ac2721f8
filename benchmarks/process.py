"""One side of a job in a process of its own: seconds and peak memory.

`python -m benchmarks.process fold|train|qlora adaptc|peft BASE ...` prints one JSON object.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch.onnx",
    "transformers",
    "peft",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "adaptc.compiler.artifacts.emit",
    "adaptc.tracing.huggingface.model",
)
"""What either side imports, before anything is measured."""
AUTO = {"causal-lm": "AutoModelForCausalLM", "feature-extraction": "AutoModel"}
STEPS = 5
"""Training steps that are timed, after two that are not."""


@dataclass(frozen=True)
class Taken:
    """What one side took: seconds, and bytes of resident memory at the peak beyond what the imports took.

    Before it trained, a module's state dict `held` so many bytes, and so many were `resident`.
    """

    seconds: float
    bytes: int
    proofs: tuple[str, ...] = ()
    held: int = 0
    resident: int = 0


def quiet() -> None:
    """Let no library talk between the rows."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def measure(job: str, side: str, *arguments: object) -> Taken:
    """Run one side of a job in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.process", job, side, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def fold(side: str, base: str, task: str, adapter: str, output: str, form: str) -> dict[str, Any]:
    """A trained adapter to a folded model: ours with its proofs; PEFT's merge with torch's export, or saved."""
    start = time.perf_counter()
    proofs: list[str] = []
    if side == "adaptc":
        compiled = _adaptc(base, task, adapter)
        compiled.emit(form, output)
        proofs = [str(proof) for proof in compiled.proofs]
    elif form == "hf":
        _peft(base, task, adapter, trainable=False).merge_and_unload().save_pretrained(output)
    else:
        import torch

        model = _peft(base, task, adapter, trainable=False).merge_and_unload().eval()
        dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch(3, 17)}
        torch.onnx.export(
            model, (), output, kwargs=batch(3, 17), dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
    return {"seconds": time.perf_counter() - start, "proofs": proofs}


def train(side: str, base: str, task: str, adapter: str, how: str, size: str) -> dict[str, Any]:
    """The median step of training the adapter on, eager or compiled by torch, on `size` rows of 64 tokens."""
    import torch

    if side == "adaptc":
        module: Any = _adaptc(base, task, adapter).module
    else:
        module = _peft(base, task, adapter, trainable=True)
    step = train_step(torch.compile(module) if how == "compiled" else module, batch(int(size), 64))
    taken = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return {"seconds": statistics.median(taken[2:])}


def qlora(side: str, base: str, stored: str, dtype: str) -> dict[str, Any]:
    """The median step of a LoRA on a base in NF4 with double quantization, and what the process holds before it.

    Args:
        side: `adaptc`, or `peft` on bitsandbytes' layers.
        base: a checkpoint in floats, or in bits.
        stored: `floats` or `bits`.
        dtype: computed in.
    """
    make = _qlora_adaptc if side == "adaptc" else _qlora_peft
    module = make(base, stored, dtype)
    held = sum(tensor.nbytes for tensor in module.state_dict().values())
    gc.collect()
    resident = _memory("VmRSS")
    step = train_step(module, batch(1, 64))
    taken = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return {"seconds": statistics.median(taken[2:]), "held": held, "resident": resident}


def _qlora_adaptc(base: str, stored: str, dtype: str) -> Any:
    import adaptc

    quantize = [{"method": "nf4", "target": "all-linear", "double": True}] if stored == "floats" else []
    lora = {"method": "lora", "target": "all-linear", "r": 16, "alpha": 32}
    spec = {
        "base": {"model": base, "task": "causal-lm", "dtype": dtype},
        "quantize": quantize,
        "adapt": [lora],
    }
    return adaptc.compile(spec).module


def _qlora_peft(base: str, stored: str, dtype: str) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=getattr(torch, dtype))
    how = {"quantization_config": config} if stored == "floats" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), device_map={"": "cpu"}, **how
    )
    model.config.use_cache = False
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def batch(rows: int, length: int) -> dict[str, Any]:
    """Random tokens, none of them padding."""
    import torch

    return {
        "input_ids": torch.randint(0, 30000, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


def train_step(module: Any, tensors: dict[str, Any]) -> Callable[[], None]:
    """A closure that runs forward, backward and an AdamW step."""
    import torch

    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        output = module(**tensors)
        loss = (output.logits if "logits" in output else output.last_hidden_state).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adaptc(base: str, task: str, adapter: str) -> Any:
    import adaptc

    return adaptc.compile({"base": {"model": base, "task": task}, "adapt": [{"adapter": adapter}]})


def _peft(base: str, task: str, adapter: str, trainable: bool) -> Any:
    import transformers
    from peft import PeftConfig, PeftModel, get_peft_model

    model: Any = getattr(transformers, AUTO[task]).from_pretrained(base)
    model.config.use_cache = False  # neither a training step nor a traced program returns one
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning and trainable:  # it does not train virtual tokens that it has read
        config.inference_mode = False
        return get_peft_model(model, config)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def main() -> None:
    """Import everything, forget the peak so far, run one side, and print what it took."""
    for name in IMPORTS:
        importlib.import_module(name)
    quiet()
    job, *arguments = sys.argv[1:]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _memory("VmRSS")
    taken = {"fold": fold, "train": train, "qlora": qlora}[job](*arguments)
    taken["resident"] = max(0, taken.get("resident", 0) - before)
    print(json.dumps({**taken, "bytes": _memory("VmHWM") - before}))


if __name__ == "__main__":
    main()
