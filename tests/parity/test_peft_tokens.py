"""PEFT's `trainable_token_indices`: rows of an embedding that are trained beside LoRA, in LoRA's own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc.errors import WeightError
from tests.families import close, differs, randomise
from tests.hugging_face import DECODER
from tests.parity.test_peft_ties import compiled, logits, of_peft, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]
ROWS = [5, 9, 12]
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "rows": (False, {"trainable_token_indices": ROWS}),
    "rows-by-name": (False, {"trainable_token_indices": {"embed_tokens": ROWS}}),
    "rows-beside-a-head": (False, {"trainable_token_indices": ROWS, "modules_to_save": ["lm_head"]}),
    "rows-beside-lora-on-the-head": (
        False, {"trainable_token_indices": ROWS, "target_modules": ["q_proj", "lm_head"]},
    ),
    "tied-rows": (True, {"trainable_token_indices": ROWS}),
    "tied-rows-by-both-names": (
        True, {"trainable_token_indices": {"lm_head": ROWS, "embed_tokens": ROWS}},
    ),
    "tied-rows-with-the-flag": (True, {"trainable_token_indices": ROWS, "ensure_weight_tying": True}),
}  # fmt: skip
QUICK = ("rows", "tied-rows")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model whose head is its embedding, and one whose head is its own: by whether they are tied."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made: dict[bool, Path] = {}
    for tied in (False, True):
        model = randomise(Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=tied)))
        model.tie_weights()
        made[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        model.save_pretrained(made[tied])
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES]
)
def test_tokens_beside_lora(bases: dict[bool, Path], name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tied, options = CASES[name]
    base = bases[tied]
    want = train(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    ours = compiled(base, tmp_path / "adapter")
    close(logits(ours.module), want)
    ours.emit("hf", tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)
    ours.save_adapter(tmp_path / "saved")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("adapter", "saved")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    close(of_peft(base, tmp_path / "saved"), want)
    close(logits(compiled(base, tmp_path / "saved").module), want)
    ours.load_adapter(tmp_path / "adapter")
    close(logits(ours.module), want)


@pytest.mark.slow
def test_rows_of_a_tied_embedding_are_replaced_before_lora_changes_the_head(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    targets = ["q_proj", "lm_head"]
    want = train(bases[True], tmp_path, target_modules=targets, trainable_token_indices=ROWS)
    close(logits(compiled(bases[True], tmp_path).module), want)


def test_our_own_are_saved_in_one_checkpoint(bases: dict[bool, Path], tmp_path: Path) -> None:
    entries = [
        {"method": "lora", "target": "*q_proj", "r": 4},
        {"method": "trainable-tokens", "target": "*embed_tokens", "token_indices": ROWS},
    ]
    base = {"model": str(bases[False]), "task": "causal-lm"}
    ours = adaptc.compile({"base": base, "adapt": entries})
    before = logits(ours.module)
    for parameter in ours.module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    want = logits(ours.module)
    differs(want, before)
    ours.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": ROWS}
    close(of_peft(bases[False], tmp_path), want)
    close(logits(compiled(bases[False], tmp_path).module), want)


def changed(adapter: Path, value: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": value}, indent=2))
    return adapter


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("five", "trainable_token_indices: expected a list, got 'five'"),
        ([5, "x", 12], "trainable_token_indices: expected a whole number, got 'x'"),
        ({"embed_tokens": ROWS, "lm_head": [1]}, "the same tokens in all modules, and these differ"),
        ({"embed_tokens": ROWS, "lm_head": ROWS}, "the file holds no tensors of lm_head for it"),
        ([5, 9, 10**9], "so there is no word 1000000000"),
        ([5, 9], "has shape [3, 32], but this base and this configuration need [2, 32]"),
        (None, "tensors fit no layer this adapter was given"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be(bases: dict[bool, Path], tmp_path: Path, value: Any, words: str) -> None:
    train(bases[False], tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    with pytest.raises(adaptc.AdaptcError) as caught:
        compiled(bases[False], changed(tmp_path, value))
    assert words in str(caught.value)


def test_rows_of_other_tokens_are_not_put_in_place_of_these(bases: dict[bool, Path], tmp_path: Path) -> None:
    train(bases[False], tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    ours = compiled(bases[False], tmp_path)
    with pytest.raises(
        WeightError, match=r"trainable_token_indices is .* there, but the module was compiled with"
    ):
        ours.load_adapter(changed(tmp_path, [5, 9, 13]))
