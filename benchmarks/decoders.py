"""Decoders that are timed: a prompt taken whole, then one token behind a past of that length, again and again.

`python -m benchmarks.decoders FILE SHARED` prints the peak of resident memory of a process that runs one, in bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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


def main() -> None:
    """Run one ONNX program, a prompt and some tokens, and print the peak of memory."""
    path, shared = sys.argv[1:]
    decoder = OnnxDecoder(Path(path), shared == "True")
    decoder.prefill(512)
    for _ in range(8):
        decoder.step()
    lines = Path("/proc/self/status").read_text().splitlines()
    print(1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))


if __name__ == "__main__":
    main()
