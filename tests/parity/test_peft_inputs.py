"""What a model was trained with is an input of its ONNX program: pairs of sentences and pages, beside PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import close, differs, perturb, randomise
from tests.hugging_face import TEXT, Model

peft = pytest.importorskip("peft")
HEAD = {"num_labels": 3}
PAGE = TEXT | HEAD | {"max_2d_position_embeddings": 1024}
PAIRS = {
    "bert": Model("BertConfig", "sequence-classification", TEXT | HEAD),
    "electra": Model("ElectraConfig", "sequence-classification", TEXT | HEAD | {"embedding_size": 16}),
    "albert": Model("AlbertConfig", "sequence-classification", TEXT | HEAD | {"embedding_size": 16}),
}
PAGES = {
    "layoutlm": Model("LayoutLMConfig", "token-classification", PAGE),
    "lilt": Model(
        "LiltConfig", "token-classification", PAGE | {"hidden_size": 48, "channel_shrink_ratio": 2}
    ),
}


def adapter_of(model: Model, path: Path) -> nn.Module:
    """A model with a PEFT adapter, saved in `base` and `adapter`."""
    torch.manual_seed(0)
    base = randomise(model.build())
    base.save_pretrained(path / "base")  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    perturb(adapted)
    adapted.save_pretrained(path / "adapter")
    return adapted.eval()


def compiled_of(model: Model, path: Path) -> adaptc.Compiled:
    return adaptc.compile(
        {
            "base": {"model": str(path / "base"), "task": model.task},
            "adapt": [{"adapter": str(path / "adapter")}],
        }
    )


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, TEXT["vocab_size"], (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def types_of_a_pair(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()


def check_program(compiled: adaptc.Compiled, want: nn.Module, tensors: dict[str, Any], path: Path) -> None:
    """ONNX Runtime and the live module compute what PEFT does, with every input of the model."""
    compiled.emit("onnx", path / "model.onnx")
    with torch.no_grad():
        expected = want(**tensors).logits
    close(onnx_runner(path / "model.onnx")(tensors)[0], expected)
    close(compiled.module.eval()(**tensors)["logits"], expected)


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("electra", "albert"))]
)
def test_a_pair_of_sentences_in_onnx_runtime_is_pefts(name: str, tmp_path: Path) -> None:
    adapted = adapter_of(PAIRS[name], tmp_path)
    compiled = compiled_of(PAIRS[name], tmp_path)
    pair = tokens(2, 8) | {"token_type_ids": types_of_a_pair(2, 8)}
    check_program(compiled, adapted, pair, tmp_path)
    with torch.no_grad():
        differs(adapted(**pair).logits, adapted(**pair | {"token_type_ids": torch.zeros(2, 8).long()}).logits)
    assert "position_ids: 0..n-1" in compiled.plan.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layoutlm", "lilt"])
def test_a_page_with_boxes_in_onnx_runtime_is_pefts(name: str, tmp_path: Path) -> None:
    adapted = adapter_of(PAGES[name], tmp_path)
    compiled = compiled_of(PAGES[name], tmp_path)
    corners = torch.tensor([[10, 20, 400, 60], [420, 20, 980, 60], [0, 100, 1000, 1000], [5, 5, 5, 5]])
    page = tokens(2, 4) | {
        "token_type_ids": types_of_a_pair(2, 4),
        "bbox": corners.expand(2, 4, 4).contiguous(),
    }
    check_program(compiled, adapted, page, tmp_path)
    with torch.no_grad():
        differs(adapted(**page).logits, adapted(**page | {"bbox": page["bbox"] // 2}).logits)
