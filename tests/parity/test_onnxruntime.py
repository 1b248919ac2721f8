"""What is exported, run in ONNX Runtime at shapes other than those traced, is what torch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptc.compiler.compiled import Compiled
from tests.families import FAMILIES, QUICK, SHAPES, Zoo, close, differs, inputs, outputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SHOWN = {("lora", "bert"), ("dora", "raw"), ("ia3", "block")}
PAIRS = [
    pytest.param(
        method, name, id=f"{method}-{name}", marks=[] if (method, name) in SHOWN else [pytest.mark.slow]
    )
    for name in FAMILIES
    for method in (("lora", "dora", "ia3", "full") if name in QUICK else ("lora",))
]


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {key: value.numpy() for key, value in tensors.items()})
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, found, strict=True)}


def dims(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape)


def check_file(path: Path, compiled: Compiled, name: str) -> Any:
    """Names, dynamic axes and validity; gives the model."""
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == list(inputs(name))
    assert [value.name for value in model.graph.output] == list(compiled.base.outputs)
    session = session_of(path)
    specs = {spec.name: spec for spec in compiled.base.inputs}
    for value in session.get_inputs():
        assert dims(value) == tuple(specs[value.name].dims), value.name
    batches = {dims(value)[0] for value in session.get_outputs()}
    assert batches == {"batch"}
    for value in session.get_outputs():
        if value.name == "logits" and name in ("llama", "gpt2"):
            assert dims(value)[1] == "seq"
    return model


def weights_of(model: Any) -> dict[str, Any]:
    """The initializers that hold a weight: all but small integer constants."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return {w.name: w for w in model.graph.initializer if w.data_type in floats and len(w.dims) > 0}


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_onnx_runtime_agrees(zoo: Zoo, method: str, name: str, tmp_path: Path) -> None:
    compiled = zoo.adapted(method, name)
    module, folded = compiled.module.eval(), compiled.fold()
    own = set(compiled.graph.adapter_names)
    models = {}
    for kind in ("folded", "live", "none"):
        path = tmp_path / kind / "model.onnx"
        compiled.emit("onnx", path, adapters=kind)
        models[kind] = check_file(path, compiled, name)
        session = session_of(path)
        for number, (batch, length) in enumerate(SHAPES):
            tensors = inputs(name, batch, length, pad=number == 0, seed=number)
            with torch.no_grad():
                adapted = outputs(module, tensors, compiled.base.outputs)
                base = zoo.run_eager(name, tensors)
            got = run(session, tensors)
            for key, value in (base if kind == "none" else adapted).items():
                close(got[key], value)
            if number == 0:
                differs(adapted[compiled.base.outputs[0]], base[compiled.base.outputs[0]])
    known = set(folded.state_dict())
    named = {n for n in known | set(compiled.base.weights) if n not in own}
    for kind in ("folded", "none"):
        found = weights_of(models[kind])
        matrices = {n for n, w in found.items() if len(w.dims) == 2 and min(w.dims) > 1}
        assert matrices <= named, f"not the model's names: {sorted(matrices - named)}"
        assert not set(found) & own
        parameters = {
            n for n, first in compiled.base.aliases.items() if n == first and n not in compiled.base.buffers
        }
        read = {str(n.target) for n in compiled.base.nodes if n.op == "get_attr"}
        assert parameters & read <= set(found)
    assert own <= set(weights_of(models["live"])), "live adapters keep their names"
    assert [n.op_type for n in models["folded"].graph.node] == [n.op_type for n in models["none"].graph.node]
    for key, value in weights_of(models["folded"]).items():
        if key in known:
            stored = torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
            assert torch.equal(stored, folded.state_dict()[key]), key
    for kind, model in models.items():
        metadata = {item.key: item.value for item in model.metadata_props}
        assert metadata["adaptc.adapters"] == kind
        assert metadata["adaptc.methods"] == method
        assert metadata["adaptc.base_sha256"] == compiled.base_sha256
        assert model.producer_name == "adaptc"


def test_tied_weights_are_stored_once(zoo: Zoo, tmp_path: Path) -> None:
    compiled = zoo.adapted("lora", "gpt2")
    compiled.emit("onnx", tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    vocabulary = [w.name for w in model.graph.initializer if tuple(w.dims) == (99, 32)]
    assert len(vocabulary) == 1
    assert vocabulary[0] in ("transformer.wte.weight", "lm_head.weight")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 22, 24])
def test_other_opsets(zoo: Zoo, opset: int, tmp_path: Path) -> None:
    compiled = zoo.adapted("lora", "llama")
    compiled.emit("onnx", tmp_path / "model.onnx", opset=opset)
    session = session_of(tmp_path / "model.onnx")
    assert [o.version for o in onnx.load(str(tmp_path / "model.onnx")).opset_import if not o.domain] == [
        opset
    ]
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs("llama", batch, length, pad=number == 0)
        with torch.no_grad():
            want = outputs(compiled.module.eval(), tensors, compiled.base.outputs)
        for key, value in want.items():
            close(run(session, tensors)[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_left_padding(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """Also where a query sees no key at all, as the first ones do here."""
    compiled = zoo.adapted("lora", name)
    compiled.emit("onnx", tmp_path / "model.onnx", adapters="live")
    tensors = inputs(name, 3, 8)
    tensors["attention_mask"][1, :5] = 0
    with torch.no_grad():
        want = outputs(compiled.module.eval(), tensors, compiled.base.outputs)["logits"]
    close(run(session_of(tmp_path / "model.onnx"), tensors)["logits"], want)
