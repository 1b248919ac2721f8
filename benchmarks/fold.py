"""One side of the way from a trained adapter to folded ONNX, in a process of its own: seconds and peak memory.

`python -m benchmarks.fold adaptc|peft BASE TASK ADAPTER OUTPUT` prints one JSON object.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import warnings
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
    "adaptc.emit.products",
    "adaptc.tracing.huggingface",
)
"""What either side imports, before anything is measured."""
AUTO = {"causal-lm": "AutoModelForCausalLM", "feature-extraction": "AutoModel"}


@dataclass(frozen=True)
class Taken:
    """What one side took: seconds, and bytes of resident memory at the peak beyond what the imports took."""

    seconds: float
    bytes: int
    proofs: tuple[str, ...] = ()


def measure(side: str, base: Path, task: str, adapter: Path, output: Path) -> Taken:
    """Run one side in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.fold", side, str(base), task, str(adapter), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def adaptc_side(base: str, task: str, adapter: str, output: str) -> tuple[str, ...]:
    """Compile and emit, proofs included."""
    import adaptc

    compiled = adaptc.compile({"base": {"model": base, "task": task}, "adapt": [{"adapter": adapter}]})
    compiled.emit("onnx", output)
    return tuple(str(proof) for proof in compiled.proofs)


def peft_side(base: str, task: str, adapter: str, output: str) -> tuple[str, ...]:
    """Merge with PEFT and export with torch."""
    import torch
    import transformers
    from peft import PeftModel

    model: Any = getattr(transformers, AUTO[task]).from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()  # type: ignore[operator]
    model.config.use_cache = False
    tensors = {
        "input_ids": torch.randint(0, 30000, (3, 17)),
        "attention_mask": torch.ones(3, 17, dtype=torch.long),
    }
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in tensors}
    torch.onnx.export(model, (), output, kwargs=tensors, dynamic_shapes=dynamic, dynamo=True, verbose=False)
    return ()


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def main() -> None:
    """Import everything, forget the peak so far, run one side, and print what it took."""
    for name in IMPORTS:
        importlib.import_module(name)
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    side, *rest = sys.argv[1:]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, start = _memory("VmRSS"), time.perf_counter()
    proofs = {"adaptc": adaptc_side, "peft": peft_side}[side](*rest)
    taken = {
        "seconds": time.perf_counter() - start,
        "bytes": _memory("VmHWM") - before,
        "proofs": proofs,
    }
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
