"""A product on a text: what transformers says of it, by the names of the base's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.products.prediction import Prediction, Scored
from tests.command_line import run
from tests.reviews import shares
from tests.served import Served

TEXT, OTHER = "a very good film .", "a dull film ."


@pytest.mark.parametrize("name", ["folded.onnx", "trainable"])
@pytest.mark.parametrize("pair", [None, OTHER])
def test_classes_by_their_names(build: Path, reviewer: Path, name: str, pair: str | None) -> None:
    prediction = adaptc.predict(build / name, TEXT, pair)
    expected = shares(reviewer, TEXT, pair)
    assert {each.label: each.score for each in prediction.scored} == pytest.approx(expected, abs=1e-5)
    assert prediction.label == max(expected, key=lambda label: expected[label])
    scores = [each.score for each in prediction.scored]
    assert scores == sorted(scores, reverse=True)


def test_the_command(build: Path, reviewer: Path) -> None:
    ran = run("run", build / "folded.onnx", "--text", TEXT, "--json")
    assert ran.code == 0, ran.err
    assert {row["label"] for row in ran.json["scored"]} == {"bad", "good", "neither"}
    assert (ran.json["task"], ran.json["text"]) == ("sequence-classification", TEXT)
    assert "pair" not in ran.json
    best = ran.json["scored"][0]
    assert run("run", build / "folded.onnx", "--text", TEXT).out.splitlines()[0] == (
        f"{best['label']}  {best['score']:.4f}"
    )


def test_embeddings_are_means_over_tokens(reviewer: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec = {"base": {"model": str(reviewer)}, "adapt": [{"method": "lora", "target": "*.query", "r": 2}]}
    adaptc.compile(spec).emit("onnx", tmp_path / "encoder.onnx")
    predict = adaptc.Predictor(tmp_path / "encoder.onnx")
    prediction = predict(TEXT, OTHER)
    model: Any = AutoModel.from_pretrained(reviewer).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(reviewer)
    with torch.no_grad():
        one, two = (
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in (TEXT, OTHER)
        )
    assert prediction.embedding == pytest.approx(one.tolist(), abs=1e-5)
    assert prediction.similarity == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), abs=1e-5)
    assert str(prediction).startswith("embedding of 16 numbers: ")
    assert predict(TEXT).similarity is None


@pytest.mark.slow
def test_next_tokens_of_a_decoder_with_a_cache(served: Served) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(served.base)
    model = served.merged().eval()
    with torch.no_grad():
        logits = model(**tokenizer("To be or not", return_tensors="pt")).logits[0, -1]
    prediction = adaptc.predict(served.program, "To be or not")
    best = logits.softmax(-1).topk(5)
    assert [each.score for each in prediction.scored] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [each.label for each in prediction.scored] == [
        repr(tokenizer.decode([t])) for t in best.indices.tolist()
    ]
    with pytest.raises(adaptc.SpecError, match="--pair: causal-lm continues one text; leave the second out"):
        adaptc.predict(served.program, "To be", "or not")


def test_what_is_printed() -> None:
    tokens = Prediction("token-classification", "a b", scored=(Scored("O", 0.5, "a"), Scored("B", 0.75, "b")))
    assert str(tokens) == "a  O  0.5000\nb  B  0.7500"
    assert tokens.to_json()["scored"] == [
        {"label": "O", "score": 0.5, "token": "a"}, {"label": "B", "score": 0.75, "token": "b"},
    ]  # fmt: skip
    assert tokens.label == "B"
    assert json.loads(json.dumps(tokens.to_json())) == tokens.to_json()


# errors


def test_what_run_refuses(build: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no product")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere.onnx", "no such path\n  expected what adaptc wrote: an ONNX program"),
        (tmp_path / "notes.txt", "no product that runs"),
        (tmp_path / "empty", "no product that runs there"),
        (build, "it holds several products: base.onnx, folded.onnx, trainable\n  name one"),
    ):
        ran = run("run", path, "--text", TEXT)
        assert ran.code == 2, ran.err
        assert f"{path}: {message}" in ran.err


def test_a_text_that_is_too_long(build: Path) -> None:
    with pytest.raises(adaptc.AdaptcError, match=r"folded.onnx: it does not run on a text of 42 tokens: "):
        adaptc.predict(build / "folded.onnx", "film " * 40)


def test_a_product_without_a_task_of_texts(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    spec = {"adapt": [{"method": "lora", "target": "0", "r": 2}]}
    compiled = adaptc.compile(spec, model=model, example_inputs=(torch.randn(2, 4),))
    compiled.emit("onnx", tmp_path / "own.onnx")
    with pytest.raises(adaptc.SpecError) as error:
        adaptc.predict(tmp_path / "own.onnx", TEXT)
    assert "its base is no Hugging Face model, which has a task, so a text alone is not read" in str(
        error.value
    )
    assert "a text says something to: sequence-classification, token-classification" in str(error.value)
