"""`adaptc generate`: what follows a prompt is what transformers generates, streamed, with its cost at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from adaptc.cli.generate_command import generate
from adaptc.generation.sampling import Sampler
from adaptc.generation.settings import Settings
from adaptc.generation.stop import Stop
from tests.command_line import run
from tests.served import Served, save_tokenizer

KINDS = ("genai", "onnx")


def path_of(served: Served, kind: str) -> Path:
    return served.directory if kind == "genai" else served.program


def expected(served: Served, prompt: str, new: int, chat: bool) -> list[int]:
    """The tokens that transformers generates."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(served.base)
    if chat:
        text = f"<|user|>{prompt}</s><|assistant|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        result = served.merged().generate(ids, max_new_tokens=new, do_sample=False)
    return result[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "chat"),
    [
        ((), True),
        pytest.param(("--chat",), True, marks=pytest.mark.slow),
        pytest.param(("--raw",), False, marks=pytest.mark.slow),
    ],
)
def test_the_text_is_that_of_transformers(served: Served, kind: str, words: Any, chat: bool) -> None:
    from transformers import AutoTokenizer

    want = expected(served, "To be or not", 16, chat)
    options = ("--prompt", "To be or not", "--max-new-tokens", 16, "--temperature", 0, "--json", *words)
    ran = run("generate", path_of(served, kind), *options)
    assert ran.code == 0, ran.err
    assert ran.json["tokens"] == len(want)
    assert ran.json["search"]["do_sample"] is False
    decoded = AutoTokenizer.from_pretrained(served.base).decode(want, skip_special_tokens=True)
    whole = ran.json["text"].replace("\ufffd", "")
    assert whole == decoded.replace("\ufffd", "")


@pytest.mark.parametrize("kind", KINDS)
def test_it_streams_and_tells_what_it_cost(served: Served, kind: str) -> None:
    ran = run(
        "generate", path_of(served, kind), "--prompt", "slings", "--max-new-tokens", 5, "--temperature", 0
    )
    assert ran.code == 0, ran.err
    assert ran.out.endswith("\n")
    for told in (
        "5 tokens (ended by length)",
        "tokens/s",
        "first token of a prompt of",
        "peak memory",
        "the likeliest",
    ):
        assert told in ran.err


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_follows_the_seed_and_the_base(served: Served, kind: str) -> None:
    def drawn(**settings: Any) -> dict[str, Any]:
        given = Settings(24, **settings)
        return generate(path_of(served, kind), "To be", given, None, (), None, lambda piece: None)

    first, again, other = drawn(seed=3), drawn(seed=3), drawn(seed=4)
    assert first["text"] == again["text"] != other["text"]
    assert first["search"]["temperature"] == 0.75
    assert first["search"]["top_k"] == 20
    assert drawn(seed=3, top_k=1)["text"] == drawn(temperature=0.0)["text"]
    assert drawn()["seed"] != drawn()["seed"]


def test_a_stop_text_ends_the_answer_and_is_not_shown(served: Served) -> None:
    pieces: list[str] = []
    settings = Settings(16, temperature=0.0)
    whole = generate(served.directory, "To be or", settings, False, (), None, lambda piece: None)["text"]
    stop = whole[3:5]
    result = generate(served.directory, "To be or", settings, False, (stop,), None, pieces.append)
    assert result["finished"] == "stop"
    assert result["text"] == "".join(pieces) == whole[: whole.index(stop)]


def test_the_beginning_of_a_stop_text_is_held_back() -> None:
    stop = Stop(["END", "EXIT"])
    assert [stop.add(piece) for piece in ("a E", "N", "d EX", "IT!")] == ["a ", "", "ENd ", ""]
    assert stop.reached
    held = Stop(["END"])
    assert (held.add("aEN"), held.rest(), held.reached) == ("a", "EN", False)


def test_the_processors_are_those_of_transformers() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9, -1.0])
    assert Sampler({}, 0).next([0], logits) == 1
    assert Sampler({"repetition_penalty": 2.0}, 0).next([1], logits) == 2
    assert Sampler({"no_repeat_ngram_size": 1}, 0).next([1, 2], logits) == 0
    drawn = {Sampler({"do_sample": True, "top_k": 2}, seed).next([0], logits) for seed in range(30)}
    assert drawn == {1, 2}
    assert {Sampler({"do_sample": True, "top_p": 0.3}, s).next([0], logits) for s in range(10)} == {1}


def test_what_continues_no_text_is_refused_with_the_way_out(served: Served, tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    untyped: Any = onnx
    untyped.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), plain)
    ways = {
        plain: "it has no cache",
        served.base: "no genai_config.json there",
        tmp_path / "gone": "no such path",
        served.base / "config.json": "nothing that continues texts",
    }
    for path, reason in ways.items():
        ran = run("generate", path, "--prompt", "hi")
        assert ran.code == 2
        assert reason in ran.err
        assert "format: genai" in ran.err
        assert "cache: true" in ran.err


def test_options_out_of_range_and_of_no_use(served: Served, tmp_path: Path) -> None:
    for option, value in (("--temperature", -1), ("--top-k", 0), ("--top-p", 1.5), ("--max-new-tokens", 0)):
        ran = run("generate", served.directory, "--prompt", "hi", option, value)
        assert ran.code == 2
        assert f"{option}: expected" in ran.err
    assert "leave it out" in run("generate", served.directory, "--prompt", "a", "--tokenizer", tmp_path).err
    long = run("generate", served.directory, "--prompt", "x" * 300)
    assert long.code == 1
    assert "and the context 128" in long.err


def test_another_tokenizer_for_a_program(served: Served, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "plain", None)
    options = ("--prompt", "To be", "--max-new-tokens", 3, "--tokenizer", tmp_path / "plain")
    ran = run("generate", served.program, *options, "--json")
    assert ran.json["prompt_tokens"] == 3
    assert "do_sample" in ran.json["search"]
    refused = run("generate", served.program, *options, "--chat")
    assert "has no chat template" in refused.err
    copied = tmp_path / "copy" / "model.onnx"
    copied.parent.mkdir()
    copied.write_bytes(served.program.read_bytes())
    assert run("generate", copied, "--prompt", "To be", "--max-new-tokens", 1).code == 0
    assert "no tokenizer there" in run("generate", copied, "--prompt", "a", "--tokenizer", tmp_path).err


def test_serving_imports_no_torch(served: Served) -> None:
    code = (
        "import sys; from adaptc.cli.app import main; sys.argv = ['adaptc', *sys.argv[1:]]; main(); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    words = ("generate", str(served.directory), "--prompt", "To be", "--max-new-tokens", "4")
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
