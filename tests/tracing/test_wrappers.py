"""Wrappers of torch, accelerate and PEFT are taken off, told, and left as they were; one that nobody knows is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import onnxruntime
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import adaptc
from adaptc.errors import TraceError


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Passing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def hooked(model: nn.Module) -> nn.Module:
    return add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def mixed(model: nn.Module) -> nn.Module:
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # what an earlier test asked for holds for the process
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def tuned(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["up"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), "OptimizedModule"),  # type: ignore[return-value]
    "compile": (compiled_in_place, "model.compile()"),
    "DataParallel": (nn.DataParallel, "DataParallel"),
    "two": (lambda model: nn.DataParallel(torch.compile(model, backend="eager")), "OptimizedModule"),  # type: ignore[arg-type]
    "averaged": (AveragedModel, "AveragedModel"),
    "checkpoint": (checkpoint_wrapper, "CheckpointWrapper"),
    "hooked": (hooked, ""),
    "mixed precision": (mixed, "mixed precision by accelerate"),
    "PEFT": (tuned, "LoraModel"),
}


def run_onnx(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.as_tensor(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_known_wrapper_is_taken_off(wrapper: str, by_name: bool, tmp_path: Path) -> None:
    wrap, told = WRAPPERS[wrapper]
    model = wrap(Perceptron()).eval()
    names, attributes = list(model.state_dict()), set(model.__dict__)
    x = torch.randn(2, 4)
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "down", "r": 2}]},
        model=model,
        example_inputs={"x": x} if by_name else (x,),
        dynamic={"x": {0: "batch"}},
    )
    assert told in "\n".join(compiled.plan.notes)
    assert bool(told) == bool(compiled.plan.notes)
    assert (names, attributes) == (list(model.state_dict()), set(model.__dict__))
    compiled.emit("onnx", tmp_path / "program.onnx")
    y = torch.randn(5, 4)
    tolerance = 2e-2 if wrapper == "mixed precision" else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / "program.onnx", x=y), model(y).float(), atol=tolerance, rtol=tolerance
        )


def test_virtual_tokens_are_no_part_of_the_model_inside() -> None:
    model = Perceptron()
    model.active_peft_config = peft.PromptTuningConfig(num_virtual_tokens=2)  # type: ignore[assignment]
    wrapped = type("PeftModel", (Passing,), {"__module__": "peft.peft_model"})(model)
    wrapped.base_model = model
    wrapped.active_peft_config = model.active_peft_config
    with pytest.raises(TraceError, match="virtual tokens in front of its model's inputs"):
        adaptc.trace(wrapped, (torch.randn(2, 4),))


def test_offloaded_weights_are_named() -> None:
    model = Perceptron()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(TraceError, match="accelerate has offloaded the weights of Linear"):
        adaptc.trace(model, (torch.randn(2, 4),))


def test_sharded_weights_are_named() -> None:
    home = "torch.distributed.fsdp.fully_sharded_data_parallel"
    sharded = type("FullyShardedDataParallel", (Passing,), {"__module__": home})(Perceptron())
    with pytest.raises(TraceError, match="shards its weights") as error:
        adaptc.trace(sharded, (torch.randn(2, 4),))
    assert "full_state_dict=True" in str(error.value)


def test_an_unknown_wrapper_takes_inputs_by_name_and_is_named() -> None:
    model, x, dynamic = Passing(Perceptron()).eval(), torch.randn(2, 4), {"x": {0: "batch"}}
    graph = adaptc.trace(model, {"x": x}, dynamic)
    assert [spec.name for spec in graph.inputs] == ["x"]
    with pytest.raises(TraceError, match="dynamic names x, but the inputs are args_0") as error:
        adaptc.trace(model, (x,), dynamic)
    assert "Passing.forward takes *args" in str(error.value)
    assert "compile the module that it calls, its `inner`" in str(error.value)
