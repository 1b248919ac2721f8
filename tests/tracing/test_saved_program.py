"""A saved torch.export program as the base, and weights beyond a protobuf's size."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx import export as emit_onnx
from adaptc.emit.onnx.runtime import onnx_runner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.up = nn.Linear(12, 20)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(20, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.relu(self.up(self.embed(ids).mean(1)))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def saved(net: Net, path: Path, training: bool) -> Path:
    dims = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    ids = torch.randint(0, 50, (3, 7))
    program = torch.export.export(net.train(training), (), {"ids": ids}, dynamic_shapes=dims)
    net.eval()
    torch.export.save(program, str(path))
    return path


@pytest.mark.parametrize("training", [False, True])
def test_a_program_is_adapted_trained_and_folded(net: Net, tmp_path: Path, training: bool) -> None:
    path = saved(net, tmp_path / "net.pt2", training)
    compiled = adaptc.compile(
        {"base": {"program": str(path)}, "adapt": [{"method": "lora", "target": "all-linear", "r": 2}]}
    )
    ids = torch.randint(0, 50, (5, 4))
    assert torch.equal(compiled.module.eval()(ids), net(ids))
    assert list(compiled.module.state_dict())[:1] == ["embed.weight"]
    with torch.no_grad():
        for name, parameter in compiled.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = compiled.module(ids)
    assert not torch.allclose(expected, net(ids))
    torch.testing.assert_close(compiled.fold()(ids), expected, rtol=1e-5, atol=1e-5)
    compiled.module.train()
    torch.manual_seed(0)
    follows = not torch.equal(compiled.module(ids), expected)
    assert follows is training  # dropout is in the program only where it was traced so


def test_inputs_of_a_program_are_its_own(net: Net, tmp_path: Path) -> None:
    compiled = adaptc.compile({"base": {"program": str(saved(net, tmp_path / "net.pt2", False))}})
    (spec,) = compiled.base.inputs
    assert (spec.name, spec.dtype, len(spec.dims), spec.high) == ("ids", "int64", 2, 50)


def test_weights_past_the_limit_stand_beside_the_program(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 100)
    ids = torch.randint(0, 50, (3, 7))
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "up", "r": 2}]},
        model=net, example_inputs=(ids,), dynamic={"ids": {0: "batch", 1: "seq"}},
    )  # fmt: skip
    compiled.emit("onnx", tmp_path / "out" / "net.onnx")
    data = tmp_path / "out" / "net.onnx.data"
    assert sorted(p.name for p in data.parent.iterdir()) == ["manifest.json", "net.onnx", "net.onnx.data"]
    product = json.loads((data.parent / "manifest.json").read_text())["products"]["net.onnx"]
    assert product["files"]["net.onnx.data"]["bytes"] == data.stat().st_size
    model = onnx.load(str(tmp_path / "out" / "net.onnx"), load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    (got,) = onnx_runner(tmp_path / "out" / "net.onnx")({"ids": ids})
    torch.testing.assert_close(got, net(ids), rtol=1e-5, atol=1e-5)
