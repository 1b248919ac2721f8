"""Decoders that are timed: a prompt taken whole, then one token behind a past of that length, again and again.

`python -m benchmarks.decoders KIND PATH THREADS` times one in a process of its own and prints a JSON document: where
programs share a process, one that is opened later may lie better in memory, which is worth a tenth.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PASTS, PROMPTS = (128, 1024), (128, 512)
STEPS, PREFILLS = 15, 2
CAPACITY = 1200
"""Tokens that fit in a shared buffer."""
WORDS = 1000
"""Token ids are drawn below this."""


class Decoder(Protocol):
    """What is timed."""

    def prefill(self, length: int) -> None:
        """Take a prompt of `length` tokens from an empty past, and keep its keys and values."""
        ...

    def step(self) -> None:
        """Take one token more."""
        ...


class OnnxDecoder:
    """An ONNX program; a step leaves the past as long as it is.

    Args:
        path: the program.
        shared: past and present are one buffer of `CAPACITY` tokens.
        threads: how many compute; they do not spin.
    """

    def __init__(self, path: Path, shared: bool, threads: int = 1):
        import onnxruntime

        untyped: Any = onnxruntime
        options = untyped.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = untyped.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._value: Any = untyped.OrtValue
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._path, self._shared, self._length = path, shared, 0
        self._past: dict[str, Any] = {}

    def prefill(self, length: int) -> None:
        """See `Decoder`."""
        room = CAPACITY if self._shared else 0
        for name, value in self._inputs.items():
            if name.startswith("past"):
                heads, size = value.shape[1], self._size(value)
                self._past[name] = self._value.ortvalue_from_numpy(
                    np.zeros((1, heads, room, size), np.float32)
                )
        presents = self._run(0, length)
        if not self._shared:
            self._past = {
                name.replace("present", "past_key_values"): value for name, value in presents.items()
            }
        self._length = length

    def step(self) -> None:
        """See `Decoder`."""
        self._run(self._length, 1)

    def _size(self, value: Any) -> int:
        """The size of a head; the builder's programs leave it open."""
        if isinstance(value.shape[3], int):
            return value.shape[3]
        config = json.loads((self._path.parent / "genai_config.json").read_text())
        return config["model"]["decoder"]["head_size"]

    def _run(self, past: int, new: int) -> dict[str, Any]:
        ids = np.random.default_rng(past).integers(0, WORDS, (1, new))
        texts = {
            "input_ids": ids,
            "attention_mask": np.ones((1, past + new), np.int64),
            "position_ids": np.arange(past, past + new)[None],
        }
        binding = self._session.io_binding()
        for name, array in texts.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            past_name = name.replace("present", "past_key_values")
            if self._shared and past_name in self._past:
                binding.bind_ortvalue_output(name, self._past[past_name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        outputs = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: value for name, value in outputs if name.startswith("present")}


class TorchDecoder:
    """A model of transformers' with its static cache; each step is behind the step before.

    Args:
        model: the model.
        compiled: by torch, as transformers compiles a decoder.
    """

    def __init__(self, model: Any, compiled: bool):
        import torch

        self._model = model
        self._step: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        self._cache: Any = None
        self._length = 0

    def prefill(self, length: int) -> None:
        """See `Decoder`."""
        from transformers import StaticCache

        self._cache = StaticCache(self._model.config, max_cache_len=CAPACITY)
        self._length = 0
        self._run(self._model, length)

    def step(self) -> None:
        """See `Decoder`."""
        self._run(self._step, 1)

    def _run(self, call: Callable[..., Any], new: int) -> None:
        import torch

        positions = torch.arange(self._length, self._length + new)
        with torch.inference_mode():
            call(
                input_ids=torch.randint(0, WORDS, (1, new)),
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._length += new


@dataclass(frozen=True)
class Timed:
    """What one decoder took.

    Attributes:
        seconds: of a token behind each of `PASTS`, and of each of `PROMPTS`: medians.
        peak: bytes of resident memory that the process had, at most, after the prompts.
    """

    seconds: list[float]
    peak: int


def timed(kind: str, path: Path, threads: int) -> Timed:
    """Time a decoder in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decoders", kind, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Timed(**json.loads(done.stdout.splitlines()[-1]))


def opened(kind: str, path: Path, threads: int) -> Decoder:
    """A decoder of a kind: `onnx`, `shared` (past and present are one buffer), `torch` or `compiled`."""
    if kind in ("onnx", "shared"):
        return OnnxDecoder(path, kind == "shared", threads)
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return TorchDecoder(AutoModelForCausalLM.from_pretrained(path).eval(), kind == "compiled")


def main() -> None:
    """Time one decoder; on one thread by the time of the processor, so that other work counts little."""
    kind, path, threads = sys.argv[1:]
    decoder = opened(kind, Path(path), int(threads))
    clock = time.process_time if threads == "1" else time.perf_counter
    prompts = [_median(partial(decoder.prefill, length), PREFILLS, clock) for length in PROMPTS]
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    steps: list[float] = []
    for past in PASTS:
        decoder.prefill(past)
        steps.append(_median(decoder.step, STEPS, clock))
    print(json.dumps(asdict(Timed([*steps, *prompts], peak))))


def _median(call: Callable[[], None], times: int, clock: Callable[[], float]) -> float:
    """The median time of a call, without that of the first."""
    taken: list[float] = []
    for _ in range(times + 1):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
