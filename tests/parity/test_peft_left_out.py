"""Where PEFT reads less than a checkpoint holds, whoever saves it is told; what it reads equals what was saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.families import close, differs, perturb, randomise
from tests.hugging_face import Model
from tests.parity.test_peft_names import SMALL_EXPERTS

peft = pytest.importorskip("peft")
MODEL = Model(
    "Qwen3MoeConfig",
    "causal-lm",
    SMALL_EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1, "num_hidden_layers": 2, "mlp_only_layers": [0]},
)
"""A dense layer, and one of experts."""
DENSE = "model.layers.0.mlp"


def saved(tmp_path: Path, target: Any) -> tuple[adaptc.Compiled, Path, list[str]]:
    """A model with a trained adapter, its base, and the warnings of saving it."""
    base = tmp_path / "base"
    randomise(MODEL.build()).save_pretrained(base)
    spec = {"base": {"model": str(base), "task": "causal-lm"}}
    compiled = adaptc.compile(spec | {"adapt": [{"method": "lora", "target": target, "r": 2}]})
    perturb(compiled.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled.save_adapter(tmp_path / "adapter")
    said = [str(warning.message) for warning in caught if "PEFT" in str(warning.message)]
    return compiled, base, said


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return logits(peft.PeftModel.from_pretrained(model, adapter))


@pytest.mark.slow
def test_dense_layers_with_names_of_experts_are_told(tmp_path: Path) -> None:
    compiled, base, said = saved(tmp_path, ["*.q_proj", f"{DENSE}.*_proj"])
    (text,) = said
    assert f"leaves out the adapters of {DENSE}.gate_proj and 2 more when it loads" in text
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["products"]["adapter"]["notes"] == [text]
    ours = logits(compiled.module)
    differs(by_peft(base, tmp_path / "adapter"), ours)
    perturb(compiled.module, seed=9)
    compiled.load_adapter(tmp_path / "adapter")
    close(logits(compiled.module), ours)


@pytest.mark.slow
def test_what_peft_refuses_is_told(tmp_path: Path) -> None:
    """It wants all parts of what it takes for one tensor of experts."""
    _, base, said = saved(tmp_path, [f"{DENSE}.gate_proj"])
    (text,) = said
    assert "refuses this adapter for qwen3_moe: Cannot convert PEFT target" in text
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        by_peft(base, tmp_path / "adapter")


def test_nothing_is_told_of_what_is_read(tmp_path: Path) -> None:
    compiled, base, said = saved(tmp_path, ["*.q_proj", "*.v_proj"])
    assert said == []
    close(by_peft(base, tmp_path / "adapter"), logits(compiled.module))
