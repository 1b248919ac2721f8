"""What a method cannot do on a layer, and what is wrong with the data it chooses by, is said at its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.messages.test_plan_errors import NET, base, refused

__all__ = ["refused"]
Refused = Callable[..., tuple[str, str]]


def entry(method: str, target: str = "layers.0.query", **keys: object) -> str:
    """One entry, in a spec with a base of two lines: on line 5, its keys from line 7 on."""
    lines = "".join(f"    {k}: {json.dumps(v)}\n" for k, v in keys.items())
    return f"adapt:\n  - method: {method}\n    target: {json.dumps(target)}\n{lines}"


CASES: list[tuple[str, str, dict[str, object], str, str]] = [
    ("adalora", "layers.0.query", {"init_r": 17}, "init_r", "rank init_r must be at most 16 here, got 17"),
    ("adalora", "layers.0.query", {"init_r": 4}, "target_r", "target_r must be at most init_r (4), got 8"),
    ("boft", "layers.0.query", {"block_size": 5}, "block_size", "block_size must divide 16, got 5"),
    (
        "boft", "layers.0.query", {"block_size": 4, "block_num": 4}, "block_size",
        "write one of block_size and block_num",
    ),
    (
        "boft", "layers.0.query", {"block_size": 4, "n_butterfly_factor": 4}, "n_butterfly_factor",
        "4 factors of blocks of 4 need an even block, and 32 to divide 16",
    ),
    ("c3a", "head", {"block_size": 4}, "block_size", "block_size must divide 16 and 3, got 4"),
    ("fourierft", "head", {"n_frequency": 49}, "n_frequency", "n_frequency must be at most 48 here, got 49"),
    ("hira", "head", {"r": 4}, "r", "rank r must be at most 3 here, got 4"),
    ("hra", "head", {"r": 3}, "r", "r must be even, since reflections start in pairs that cancel, got 3"),
    ("hra", "head", {"r": 18}, "r", "rank r must be at most 16 here, got 18"),
    ("hra", "head", {"apply_GS": True}, "apply_GS", "equal pairs cannot be made orthogonal"),
    ("loha", "head", {"r": 4}, "r", "rank r must be at most 3 here, got 4"),
    ("lora", "head", {"r": 3, "init_weights": "orthogonal"}, "init_weights", "orthogonal needs an even rank, got 3"),
    ("miss", "head", {"r": 17}, "r", "r must be at most 16 here, got 17"),
    ("miss", "head", {"r": 4, "init_weights": "bat"}, "r", "bat needs r to divide 16 and 3, got 4"),
    ("miss", "head", {"r": 4, "init_weights": "mini", "mini_r": 2}, "mini_r", "mini_r must divide 3, got 2"),
    (
        "miss", "layers.0.query", {"r": 4, "init_weights": "bat", "dropout": 0.1}, "dropout",
        "bat has no branch that dropout could go in front of",
    ),
    ("oft", "head", {"r": 4, "block_size": 4}, "r", "write one of r (how many blocks) and block_size"),
    ("road", "head", {"group_size": 2}, "group_size", "group_size must divide 3, got 2"),
    ("shira", "head", {"r": 3}, "r", "r makes 57 entries, and there are 48 here"),
    ("vblora", "head", {"vector_length": 4}, "vector_length", "vector_length must divide 16 and 3, got 4"),
    (
        "vblora", "layers.0.query", {"vector_length": 4, "num_vectors": 3, "topk": 4}, "topk",
        "topk must be at most num_vectors (3), got 4",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "keys", "key", "words"), CASES)
def test_a_method_says_what_it_needs(
    refused: Refused, method: str, target: str, keys: dict[str, object], key: str, words: str
) -> None:
    text, place = refused(NET + entry(method, target, **keys))
    assert f"{method}: {words}" in text
    assert f"site {target} (linear 16 -> " in text
    line = 7 + list(keys).index(key) if key in keys else 5
    assert place.startswith(f"{line}:"), (place, text)
    assert f"adapt.0.{key}: " in text


WORDS = base("embedded", "{ids: 'int64[batch, seq]'}")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "required: the indices of the words to train"),
        ([3, 99], "the vocabulary has 99 words, so there is no word 99"),
        ([-1], "there is no word -1"),
        ([4, 4], "a word is named twice"),
    ],
)
def test_words_that_cannot_be_trained(refused: Refused, tokens: list[int], words: str) -> None:
    text, place = refused(WORDS + entry("trainable-tokens", "embed", token_indices=tokens))
    assert words in text
    assert place.startswith("7:")


@pytest.mark.parametrize("keys", [{"variant": "D"}, {"reserve_p": 0}, {"reserve_p": 1.5}], ids=str)
def test_child_tuning_needs_data_and_a_share(refused: Refused, keys: dict[str, object]) -> None:
    text, place = refused(NET + entry("child-tuning", "*", **keys))
    if "variant" in keys:
        assert "child-tuning chooses by data, and there is none" in text
        assert "name some: `calibration: rows.jsonl`, inputs with labels" in text
        assert place.startswith("5:")
    else:
        assert "reserve_p" in text
        assert place.startswith("7:")


LABELLED = base("labelled", "{x: 'float32[batch, 16]', labels: 'int64[batch]'}")
ROW = {"x": [0.5] * 16, "labels": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", None, "rows.jsonl: no such file"),
        ("rows.csv", "x", "rows.csv: expected a .jsonl or a .safetensors file"),
        ("rows.jsonl", "", "calibration: there is no row of data"),
        ("rows.jsonl", json.dumps(ROW) + "\n{", "rows.jsonl:2: not JSON"),
        ("rows.jsonl", "[1]", "rows.jsonl:1: expected an object of inputs, got list"),
        (
            "rows.jsonl",
            json.dumps({**ROW, "x": ["a"]}),
            "rows.jsonl:1: x: expected numbers and lists of them",
        ),
        (
            "rows.jsonl",
            json.dumps({"x": ROW["x"]}),
            "row 1 has x, expected x: float32[batch, 16], labels: int64[batch]",
        ),
        (
            "rows.jsonl",
            json.dumps(ROW) + "\n" + json.dumps({**ROW, "labels": 77}),
            "row 2: labels holds 77, but the model knows 0 to",
        ),
        (
            "rows.jsonl",
            json.dumps({**ROW, "x": 1.0}),
            "row 1: x has 1 dimensions, expected float32[batch, 16]",
        ),
    ],
)
def test_calibration_that_cannot_be_read(
    refused: Refused, tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    emit = "emit: [{format: peft, path: out}]\n"
    spec = LABELLED + f"calibration: {name}\n" + entry("fishmask", "*") + emit
    text, place = refused(spec, 2, "compile")
    assert words in text
    assert place.startswith("4:")


def test_a_model_without_a_loss_has_no_fisher_information(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"x": ROW["x"]}))
    emit = "emit: [{format: peft, path: out}]\n"
    text, place = refused(NET + "calibration: rows.jsonl\n" + entry("fishmask", "*") + emit, 2, "compile")
    assert "calibration needs a loss, and the model gives none: put its labels among `inputs`" in text
    assert place.startswith("4:")


def test_rows_as_text_and_as_tensors_choose_alike(cli: Any, write: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(5, 16), torch.tensor([0, 1, 2, 1, 0])
    lines = [
        json.dumps({"x": row.tolist(), "labels": int(label)}) for row, label in zip(x, labels, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    save_file({"x": x, "labels": labels}, tmp_path / "rows.safetensors")
    found = []
    for kind in ("jsonl", "safetensors"):
        emit = f"emit: [{{format: peft, path: {kind}}}]\n"
        text = LABELLED + f"calibration: rows.{kind}\n" + entry("fishmask", "*", keep_ratio=0.1) + emit
        result = cli("compile", write(text))
        assert result.code == 0, result.err
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        found.append(config["adaptc_options"]["counts"])
    assert found[0] == found[1]
    assert sum(found[0].values()) == round(0.1 * (4 * (256 + 16) + 51))


def test_a_plan_reads_no_rows(cli: Any, write: Any) -> None:
    result = cli("plan", write(LABELLED + "calibration: nowhere.jsonl\n" + entry("fishmask", "*")), "--json")
    assert result.code == 0, result.err
    budget = json.loads(result.out)["budget"]
    assert 4 <= budget["trainable"] <= 20


def test_indices_that_point_nowhere(cli: Any, write: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    emit = "emit: [{format: peft, path: out}]\n"
    assert cli("compile", write(NET + entry("shira", r=2) + emit)).code == 0
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "indices" in key)
    tensors[key][0, 0] = 16
    save_file(tensors, file)
    result = cli("compile", write(NET + "adapt: [{adapter: out}]\nemit: [{format: peft, path: again}]\n"))
    assert result.code == 1
    assert "holds the index 16, expected 0 to 15" in result.err


def test_the_rank_of_a_plain_adapter_stays(refused: Refused, trained: Path, tmp_path: Path) -> None:
    text, place = refused(NET + f"adapt:\n  - adapter: {trained}\n    r: 1\n")
    assert "the ranks of lora are not nested, as those of dylora are: leave r out" in text
    assert place.startswith("6:")
