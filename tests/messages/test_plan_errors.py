"""What is wrong with a base, a target, a pipeline or an output is said at its place, with the right exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

NET = 'base: {python: "message_models:build"}\ninputs: {x: "float32[batch, 16]"}\n'
EMIT = "emit: [{format: peft, path: out}]\n"


def base(factory: str, inputs: str = '{x: "float32[batch, 16]"}') -> str:
    return f'base: {{python: "message_models:{factory}"}}\ninputs: {inputs}\n'


FORMATS = ["peft", "torch", pytest.param("onnx", marks=pytest.mark.slow)]


def emit(form: str) -> str:
    return f"emit: [{{format: {form}, path: out/product}}]\n"


def lora(**keys: object) -> str:
    """One entry; its keys stand on lines of their own, from line 5 of a spec with a base of two lines."""
    return "adapt:\n  - method: lora\n" + "".join(f"    {k}: {json.dumps(v)}\n" for k, v in keys.items())


@pytest.fixture
def refused(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[str, str]]:
    """Run a command, expect a refusal; gives its words, and their place where the spec is named."""

    def check(text: str, code: int = 2, command: str = "plan", *words: object) -> tuple[str, str]:
        path = write(text)
        before = sorted(p.name for p in tmp_path.rglob("*"))
        result = cli(command, path, *words)
        shown = f"exit code {result.code}\n{result.out}\n{result.err}"
        assert "Traceback" not in result.err, shown
        assert result.code == code, shown
        assert result.err.strip(), "no words on standard error"
        if code == 2 or command == "plan":
            assert result.out == "", shown
        assert sorted(p.name for p in tmp_path.rglob("*")) == before, "something was written"
        first = result.err.splitlines()[0]
        place = first.removeprefix(f"{path}:").split(": ")[0] if first.startswith(f"{path}:") else ""
        return result.err, place

    return check


# targets


def test_nothing_matches(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target=["*.qurey"]))
    assert place == "6:13"
    assert (
        "adapt.0.target: lora: the target matches no linear/conv/embedding/experts layer of message_models:build"
        in text
    )
    assert re.search(r"near: .*layers\.\d\.query", text)


def test_every_problem_is_said_at_once(refused: Callable[..., tuple[str, str]]) -> None:
    entries = (
        lora(target=["*.qurey"])
        + "  - {method: ia3, target: '*.valeu'}\n"
        + "  - {method: lora, target: head, r: 9}\n"
    )
    text, _ = refused(NET + entries)
    assert ":6:13: adapt.0.target: " in text
    assert ":7:27: adapt.1.target: " in text
    assert ":8:37: adapt.2.r: " in text


def test_one_pattern_of_several_matches_nothing(
    cli: Callable[..., Any], write: Callable[[str], Path]
) -> None:
    path = write(NET + lora(target=["*.query", "*.valeu"]))
    for words in ([], ["--json"]):
        result = cli("plan", path, *words)
        assert result.code == 0, result.err
        assert "*.valeu" in result.out
        assert re.search(r"layers\.\d\.value", result.out), "the near miss is not shown"


@pytest.mark.parametrize("target", ["query", "layers.0", "Linear", "re:query", "layers.*.que"])
def test_a_name_that_is_short_of_a_module(refused: Callable[..., tuple[str, str]], target: str) -> None:
    text, _ = refused(NET + lora(target=target))
    assert "matches no linear/conv/embedding/experts layer" in text
    assert "layers.0.query" in text


def test_a_type_that_the_method_cannot_sit_on(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(
        base("tied", '{ids: "int64[batch, seq]"}') + lora(target="embed").replace("lora", "ia3")
    )
    assert place == "6:13"
    assert "ia3: the target matches no linear/conv/experts layer" in text
    assert "embed (Embedding" in text, "what did match is not said"


def test_layers_beyond_the_last(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target={"name": "*.query", "layers": "7-9"}))
    assert place == "6:13"
    assert "matches no linear/conv/embedding/experts layer" in text
    assert "layers.0.query" in text


def test_exclude_takes_out_everything(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query", exclude=["layers.*"]))
    assert place.startswith(("6:", "7:"))
    assert "`exclude` took out all that matched: layers.0.query, layers.1.query" in text


def test_rank_above_the_layer(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target=["*.query", "head"], alpha=8, r=5))
    assert place == "8:8"
    assert "adapt.0.r: lora: rank r must be at most 3 here, got 5" in text
    assert "head" in text


def test_default_rank_above_the_layer(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="head"))
    assert place.startswith("5:")
    assert "rank r must be at most 3 here, got 8" in text


def test_rank_pattern_above_the_layer(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target=["*.query"], r=2, rank_pattern={"layers.1.query": 17}))
    assert "at most 16 here, got 17" in text
    assert place == "8:38", "the rank that is too large stands in rank_pattern, not in r"


def test_rank_above_the_layer_by_set(refused: Callable[..., tuple[str, str]]) -> None:
    text, _ = refused(NET + lora(target="head", r=2), 2, "plan", "--set", "adapt.0.r=9")
    assert "--set adapt.0.r=9: adapt.0.r: " in text
    assert "at most 3 here, got 9" in text


def test_two_entries_clash(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query") + "  - {method: lora, target: all-linear, r: 2}\n")
    assert place.startswith("7:")
    assert "adapt.1: lora: adapt.0 puts an adapter named 'default' on layers.0.query already" in text
    assert "give one of them another `name`" in text


def test_two_entries_of_other_names_do_not(cli: Callable[..., Any], write: Callable[[str], Path]) -> None:
    path = write(NET + lora(target="*.query") + "  - {method: lora, name: b, target: '*.query'}\n")
    assert cli("plan", path).code == 0


@pytest.mark.parametrize("target", ["spare", "*spare*", ["spare"]])
def test_on_no_path_to_the_output(refused: Callable[..., tuple[str, str]], target: Any) -> None:
    text, place = refused(base("unused") + lora(target=target))
    assert place == "6:13"
    assert "spare" in text
    assert "on no path to the output: spare" in text


def test_behind_a_detach(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(base("unused") + lora(target=["main", "frozen"]))
    assert place == "6:13"
    assert "frozen is on no path to the output that carries a gradient, so it cannot be trained" in text
    assert "leave it out with `exclude`" in text


# bases


def test_no_base(refused: Callable[..., tuple[str, str]]) -> None:
    text, _ = refused(lora(target="*"))
    assert "base: required, but missing" in text


def test_missing_directory(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    text, place = refused("base: {model: ./nowhere}\n" + lora(target="*"))
    assert place == "2:15"
    assert f"base.model: {tmp_path / 'nowhere'}: no such directory" in text
    assert "relative to the spec file" in text
    assert "make model" not in text


def test_the_model_of_the_specs_is_missing(refused: Callable[..., tuple[str, str]]) -> None:
    text, _ = refused("base: {model: ./all-MiniLM-L6-v2}\n" + lora(target="*"))
    assert "`make model`, in adaptc's folder, puts it there" in text


def test_a_name_without_a_slash_that_is_nowhere(
    refused: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, place = refused("base: {model: nowhere-bert}\n" + lora(target="*"))
    assert place == "2:15"
    assert "nowhere-bert" in text


def test_directory_without_a_configuration(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    text, place = refused("base: {model: ./m}\n" + lora(target="*"))
    assert place == "2:15"
    assert "holds no config.json" in text
    assert "expected a Hugging Face model directory" in text


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "bret"}', '{"model_type": 3}'])
def test_broken_configuration(refused: Callable[..., tuple[str, str]], tmp_path: Path, config: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(config)
    text, place = refused("base: {model: ./m}\n" + lora(target="*"))
    assert place == "2:15"
    assert "configuration cannot be read" in text or "config.json" in text


def test_configuration_that_makes_no_model(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = {"model_type": "bert", "hidden_size": 33, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    text, place = refused("base: {model: ./m}\n" + lora(target="*"))
    assert place == "2:15"
    assert "33" in text


def test_unknown_task(refused: Callable[..., tuple[str, str]], bert: Path) -> None:
    text, place = refused(f"base:\n  model: {bert}\n  task: causal-ml\n" + lora(target="*"))
    assert place == "4:9"
    assert "base.task: unknown task 'causal-ml'; did you mean 'causal-lm'" in text
    assert "sequence-classification" in text


def test_task_that_the_model_has_not(refused: Callable[..., tuple[str, str]], bert: Path) -> None:
    text, place = refused(f"base:\n  model: {bert}\n  task: seq2seq-lm\n" + lora(target="*"))
    assert place.startswith(("3:", "4:"))
    assert "cannot be loaded for task 'seq2seq-lm'" in text


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("no_such_package:build", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("message_models:bulid", "has no attribute 'bulid'"),
        ("message_models:NUMBER", "not callable"),
        ("message_models:broken", "RuntimeError: the weights are on the moon"),
        ("message_models:no_module", "returned dict, expected a torch.nn.Module"),
    ],
)
def test_factory(refused: Callable[..., tuple[str, str]], factory: str, words: str) -> None:
    text, place = refused(
        f'base: {{python: "{factory}"}}\ninputs: {{x: "float32[batch, 16]"}}\n' + lora(target="*")
    )
    assert place == "2:16"
    assert words in text
    assert factory in text
    assert text.count("base.python") == 1, "the place is said twice"


def test_factory_with_unknown_arguments(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET.replace('build"', 'build", args: {widht: 3}') + lora(target="*"))
    assert place.startswith("2:")
    assert "widht" in text


def test_factory_without_inputs(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused('base: {python: "message_models:build"}\n' + lora(target="*"))
    assert "inputs: a 'python' base needs its inputs, such as x: float32[batch, 16]" in text
    assert place


def test_control_flow_on_data(refused: Callable[..., tuple[str, str]], models: Path) -> None:
    text, _ = refused(base("branching") + lora(target="*"), 1)
    line = next(i for i, t in enumerate(models.read_text().splitlines(), 1) if "the data decides" in t)
    assert "Branching could not be traced" in text
    assert f"{models}:{line}" in text
    assert "torch.where there" in text


def test_a_named_dimension_that_is_fixed(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(base("fixed_batch") + lora(target="*"))
    assert place.startswith("3:")
    assert "input x: dimension `batch` is fixed by the model, which computes differently at each size" in text
    assert "(it was traced with 3): write the size you will run it with, such as float32[3, 16]" in text


@pytest.mark.parametrize(
    ("factory", "inputs", "name"),
    [
        ("two_inputs", '{x: "float32[batch, 16]", y: "float32[batch, 16]"}', "y"),
        ("build", '{x: "float32[batch, 16]", z: "float32[batch, 16]"}', "z"),
        ("build", '{z: "float32[batch, 16]"}', "z"),
        ("two_inputs", '{x: "float32[batch, 16]"}', "y"),
    ],
    ids=["not used", "unknown", "another name", "missing"],
)
def test_inputs_that_do_not_fit(
    refused: Callable[..., tuple[str, str]], factory: str, inputs: str, name: str
) -> None:
    message, place = refused(base(factory, inputs) + lora(target="*"))
    assert place.startswith("3:"), "the inputs stand in line 3"
    assert re.search(rf"\b{name}\b", message)
    assert "inspect.py" not in message, "that is not the user's own code"
    assert "control flow" not in message, "nothing is wrong with the control flow"


def test_inputs_of_another_width(refused: Callable[..., tuple[str, str]], models: Path) -> None:
    text, _ = refused(base("build", '{x: "float32[batch, 17]"}') + lora(target="*.query"), 1)
    assert f"{models}:12" in text, "the line that fails is not quoted"


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_inputs_of_another_dtype(cli: Callable[..., Any], write: Callable[[str], Path], form: str) -> None:
    path = write(base("build", '{x: "int64[batch, 16]"}') + lora(target="*.query") + emit(form))
    result = cli("compile", path)
    assert result.code == 1
    assert "Traceback" not in result.err, result.err
    assert "dtype" in result.err
    assert not (path.parent / "out/product").exists()


def hugging_face(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "m"))


def test_truncated_base_can_be_planned(
    cli: Callable[..., Any], write: Callable[[str], Path], bert: Path, tmp_path: Path
) -> None:
    file = hugging_face(bert, tmp_path) / "model.safetensors"
    file.write_bytes(b"")
    result = cli("plan", write("base: {model: ./m}\n" + lora(target="*.query")))
    assert result.code == 0, result.err


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_base(
    cli: Callable[..., Any], write: Callable[[str], Path], bert: Path, tmp_path: Path, form: str
) -> None:
    file = hugging_face(bert, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = cli("compile", write("base: {model: ./m}\n" + lora(target="*.query") + emit(form)))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert f"{file}: not a whole safetensors file" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_base_of_other_shapes(
    cli: Callable[..., Any], write: Callable[[str], Path], bert: Path, tmp_path: Path, form: str
) -> None:
    file = hugging_face(bert, tmp_path) / "model.safetensors"
    values = load_file(file)
    name = "encoder.layer.1.intermediate.dense.weight"
    values[name] = torch.ones(41, 32)
    save_file(values, file, metadata={"format": "pt"})
    result = cli("compile", write("base: {model: ./m}\n" + lora(target="*.query") + emit(form)))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert f"{file}: tensor '{name}' has shape [41, 32], but config.json describes [37, 32]" in result.err
    assert not (tmp_path / "out").exists()


def test_base_with_only_a_pickle(
    cli: Callable[..., Any], write: Callable[[str], Path], bert: Path, tmp_path: Path
) -> None:
    folder = hugging_face(bert, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    result = cli("compile", write("base: {model: ./m}\n" + lora(target="*.query") + emit("torch")))
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "only pickles (pytorch_model.bin), which can run code; expected model.safetensors" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {"a": "gone.safetensors"}}'])
def test_broken_index_of_shards(
    cli: Callable[..., Any], write: Callable[[str], Path], bert: Path, tmp_path: Path, index: str
) -> None:
    folder = hugging_face(bert, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    result = cli("compile", write("base: {model: ./m}\n" + lora(target="*.query") + emit("torch")))
    assert result.code == 1
    assert "Traceback" not in result.err, result.err
    assert "model.safetensors.index.json" in result.err or "gone.safetensors" in result.err


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 half a zip"], ids=["missing", "empty", "cut"])
def test_program_that_is_none(
    refused: Callable[..., tuple[str, str]], tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "base.pt2").write_bytes(content)
    text, place = refused("base: {program: base.pt2}\n" + lora(target="*"))
    assert place == "2:17"
    assert "torch.export.save" in text


# passes


def test_unknown_pass(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query") + "passes:\n  - insert\n  - flod\n")
    assert place == "9:5"
    assert "passes.1: unknown pass 'flod'; did you mean 'fold'?" in text


def test_unknown_option_of_a_pass(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query") + "passes:\n  - insert\n  - factor: {tokns: 3}\n")
    assert place.startswith("9:")
    assert "tokns" in text
    assert "its options: tokens" in text


def test_option_of_a_pass_of_the_wrong_type(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query") + "passes:\n  - insert\n  - factor: {tokens: many}\n")
    assert place.startswith("9:")
    assert "tokens" in text


@pytest.mark.parametrize("order", ["[fold, insert]", "[insert, fold, factor]", "[insert, fold, insert]"])
def test_impossible_order(refused: Callable[..., tuple[str, str]], order: str) -> None:
    text, place = refused(NET + lora(target="*.query") + f"passes: {order}\n")
    assert place.startswith("7:")
    assert "takes a graph that is" in text
    assert "adaptc passes" in text


def test_passes_without_insert(refused: Callable[..., tuple[str, str]]) -> None:
    text, place = refused(NET + lora(target="*.query") + "passes: []\n")
    assert place == "7:9"
    assert "the pipeline leaves out `insert`" in text


def test_unknown_pass_to_print(refused: Callable[..., tuple[str, str]]) -> None:
    text, _ = refused(NET + lora(target="*.query") + EMIT, 2, "compile", "--print-after", "flod")
    assert "--print-after" in text
    assert "unknown pass 'flod'" in text


# products


def test_fold_into_a_tied_weight(
    refused: Callable[..., tuple[str, str]], cli: Callable[..., Any], write: Any
) -> None:
    tied = base("tied", '{ids: "int64[batch, seq]"}') + lora(target="head", r=2)
    text, _ = refused(
        tied + "emit:\n  - {format: peft, path: out/a}\n  - {format: onnx, path: out/m.onnx}\n", 1, "compile"
    )
    assert "cannot be folded into" in text
    assert "adapters: live" in text
    noted = cli("plan", write(tied))
    assert noted.code == 0
    assert "cannot be folded" in noted.out


def test_nothing_to_write(refused: Callable[..., tuple[str, str]]) -> None:
    text, _ = refused(NET + lora(target="*.query"), 2, "compile")
    assert "emit: nothing to write" in text


@pytest.mark.parametrize(
    "entry", ["peft, path: taken/out", "onnx, path: taken/m.onnx", "torch, path: taken/out"]
)
def test_a_file_where_a_folder_is_needed(
    refused: Callable[..., tuple[str, str]], tmp_path: Path, entry: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    text, _ = refused(NET + lora(target="*.query") + f"emit: [{{format: {entry}}}]\n", 1, "compile")
    assert f"cannot write to {tmp_path / 'taken'}" in text
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("path", [".", "..", "sub/..", "./"])
@pytest.mark.parametrize("form", ["peft", "torch"])
def test_the_folder_of_the_spec(refused: Callable[..., tuple[str, str]], path: str, form: str) -> None:
    text, place = refused(
        NET + lora(target="*.query") + f"emit:\n  - format: {form}\n    path: {path}\n", 2, "compile"
    )
    assert place == "9:11"
    assert "emit.0.path: " in text
    assert "holds the spec itself" in text


def test_a_folder_of_the_users_own(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("three years")
    text, place = refused(
        NET + lora(target="*.query") + "emit:\n  - format: peft\n    path: work\n", 2, "compile"
    )
    assert place == "9:11"
    assert "holds files adaptc did not write (thesis.txt): choose another path" in text


def test_one_product_inside_another(refused: Callable[..., tuple[str, str]]) -> None:
    entries = "emit:\n  - {format: torch, path: build}\n  - {format: onnx, path: build/m.onnx}\n"
    text, place = refused(NET + lora(target="*.query") + entries, 2, "compile")
    assert place == "9:26"
    assert "lies inside the folder that emit.0 writes" in text


def test_a_merged_model_within_its_own_base(refused: Callable[..., tuple[str, str]], bert: Path) -> None:
    entries = f"emit:\n  - {{format: hf, path: {bert}/merged}}\n"
    text, place = refused(f"base: {{model: {bert}}}\n" + lora(target="*.query") + entries, 2, "compile")
    assert place == "7:24"
    assert f"{bert}/merged is within the base's own directory" in text


def test_a_merged_model_of_a_pipeline_that_factors(
    refused: Callable[..., tuple[str, str]], bert: Path
) -> None:
    more = "passes: [insert, factor]\n" + emit("hf")
    text, place = refused(f"base: {{model: {bert}}}\n" + lora(target="*.query") + more, 2, "compile")
    assert place == "6:9"
    assert "the pipeline leaves a graph that is factored, which emit.0 cannot fold" in text


def test_output_dir_that_is_a_file(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    text, _ = refused(NET + lora(target="*.query") + EMIT, 1, "compile", "--output-dir", tmp_path / "taken")
    assert str(tmp_path / "taken") in text
    assert (tmp_path / "taken").read_text() == "mine"


def test_graph_dump_that_is_a_file(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    text, _ = refused(NET + lora(target="*.query") + EMIT, 1, "compile", "--dump-graphs", tmp_path / "taken")
    assert f"cannot write {tmp_path / 'taken'}" in text


# the command itself


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "nowhere.yaml"], "nowhere.yaml: cannot be read: no such file"),
        (["plan", "."], "cannot be read: is a directory"),
        (["plan"], "Missing argument 'spec'"),
        (["pln", "spec.yaml"], "pln"),
        (["compile", "nowhere.yaml", "--set", "base"], "nowhere.yaml"),
        (["init", "nowhere"], "nowhere: no config.json there"),
        (["plan", "nowhere.yaml", "--what"], "--what"),
    ],
)
def test_command(cli: Callable[..., Any], words: list[str], said: str) -> None:
    for extra in ([], ["--json"]) if words[0] in ("plan", "compile") and len(words) == 2 else ([],):
        result = cli(*words, *extra)
        assert result.code == 2, result
        assert said in result.err
        assert result.out == ""
        assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "setting", ["base", "=3", "adapt.7.r=3", "adapt.0.r=[", "adapt.0.rr=3", "adapt.0.r.x=3"]
)
def test_set(refused: Callable[..., tuple[str, str]], setting: str) -> None:
    text, _ = refused(NET + lora(target="*.query", r=2), 2, "plan", "--set", setting)
    assert text.startswith(f"--set {setting}")


def test_json_is_empty_on_error(cli: Callable[..., Any], write: Callable[[str], Path]) -> None:
    path = write(NET + lora(target="*.qurey") + EMIT)
    for command in ("plan", "compile"):
        result = cli(command, path, "--json")
        assert result.code == 2
        assert result.out == ""
        assert re.search(r"near: .*layers\.\d\.query", result.err)


def test_folded_is_folded_whatever_the_pipeline(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path
) -> None:
    """A pipeline that factors cannot give a folded product: refused, or folded all the same; never live in disguise."""
    import onnx

    made = {}
    for name, pipeline in (("plain", "[insert]"), ("factored", "[insert, factor]")):
        text = (
            NET
            + lora(target="*.query")
            + f"passes: {pipeline}\nemit: [{{format: onnx, path: {name}.onnx}}]\n"
        )
        result = cli("compile", write(text))
        if result.code:
            assert name == "factored"
            assert "Traceback" not in result.err
            assert "fold" in result.err
            assert not (tmp_path / "factored.onnx").exists()
            return
        made[name] = [node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node]
    assert made["factored"] == made["plain"], "`adapters: folded` wrote a program with live adapters"


@pytest.mark.parametrize("form", ["peft", "torch"])
def test_what_is_trained_is_not_folded(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    """A pipeline's fold is for folded products; adapters stay where they are trained or saved."""
    done = cli("compile", write(NET + lora(target="*.query") + "passes: [insert, fold]\n" + emit(form)))
    assert not done.code, done.err
    assert [p for p in (tmp_path / "out/product").rglob("*") if p.suffix in (".safetensors", ".pt2")]


def test_onnx_runtime_does_not_take_it(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    double = base("curved", '{x: "float64[batch, 16]"}').replace('curved"', 'curved", dtype: float64')
    text, _ = refused(double + lora(target="*.query") + emit("onnx"), 1, "compile")
    assert "ONNX Runtime does not take it" in text
    assert ".adaptc-" not in text, "the file named is a temporary one, which is gone"
    assert str(tmp_path / "out/product") in text
