"""A checkpoint of PEFT on a layer it computes otherwise there: an error that names the file and the key."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError

peft = pytest.importorskip("peft")


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv1d(4, 8, 3, groups=2, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.conv(x).mean(-1))


class Words(nn.Module):
    def __init__(self, words: int = 20) -> None:
        super().__init__()
        self.embed_tokens, self.lin = nn.Embedding(words, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.embed_tokens(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


def refused(model: nn.Module, base: nn.Module, path: Path, written: Any = None, **options: Any) -> str:
    """Save an adapter of one model as PEFT does, compile another with it, and give the error's words."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
        theirs.save_pretrained(path)
    if written:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | written))
    words = isinstance(base, Words)
    x = torch.randint(0, 20, (3, 5)) if words else torch.randn(3, 4, 6)
    with pytest.raises(AdaptcError) as error:
        adaptc.compile(
            {"adapt": [{"adapter": str(path)}]},
            model=base,
            example_inputs=(x,),
            dynamic={"x": {0: "batch"}},
        )
    text = str(error.value)
    assert "adapt.0.adapter" in text
    assert str(path) in text
    return text.replace(str(path), "")  # it holds the name of the test


def test_grouped_convolution(tmp_path: Path) -> None:
    """PEFT multiplies across the groups there, which is no change of the layer's own weight."""
    text = refused(Grouped(), Grouped(), tmp_path, target_modules=["conv", "lin"])
    assert "the grouped convolution conv reaches across groups" in text


def test_resized_vocabulary(tmp_path: Path) -> None:
    text = refused(Words(24), Words(20), tmp_path, target_modules=["embed_tokens"])
    assert "base_model.model.embed_tokens." in text
    assert "24" in text
    assert "20" in text


def test_resized_vocabulary_trained_whole(tmp_path: Path) -> None:
    text = refused(Words(24), Words(20), tmp_path, target_modules=["lin"], modules_to_save=["embed_tokens"])
    assert "'base_model.model.embed_tokens.weight' is for a vocabulary of 24 words" in text
    assert "embed_tokens of this base has 20" in text
    assert "name that folder as base.model" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_replication", [[0, 2], [1, 3]]), ("trainable_token_indices", {"embed_tokens": [1, 2]})],
)
def test_what_changes_more_than_a_weight(tmp_path: Path, key: str, value: Any) -> None:
    base = Words()
    text = refused(base, base, tmp_path, {key: value}, target_modules=["lin"])
    assert key in text
