"""The command line: what each command prints and writes, and the manifest it leaves."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import Ran, run
from tests.hugging_face import MODELS

MODEL = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(16, width)
        self.value = nn.Linear(width, 16)

    def forward(self, x):
        return self.value(torch.tanh(self.query(x)))


def build(width=12):
    torch.manual_seed(0)
    return Net(width)
"""
SPEC = """\
version: 1
base: {python: "cli_models:build"}
inputs: {x: "float32[batch, 16]"}
adapt:
  - {method: lora, target: ["*.qurey", query, value], r: 4, dropout: 0.1}
  - {method: ia3, name: second, target: query}
emit:
  - {format: onnx, path: out/model.onnx}
  - {format: torch, path: out/trainable}
  - {format: peft, path: out/adapter}
"""
PEFT_ONLY = SPEC[: SPEC.index("emit:")] + "emit: [{format: peft, path: out/adapter}]\n"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ran]]:
    """Run `adaptc` in this process, where `cli_models` can be imported."""
    folder = tmp_path_factory.mktemp("cli_models")
    (folder / "cli_models.py").write_text(MODEL)
    sys.path.insert(0, str(folder))
    yield run
    sys.path.remove(str(folder))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A spec that writes a checkpoint only: the fastest compile."""
    path = tmp_path / "spec.yaml"
    path.write_text(PEFT_ONLY)
    return path


@pytest.fixture(scope="module")
def compiled(cli: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The folder and the JSON of one whole compile."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "spec.yaml").write_text(SPEC)
    ran = cli("compile", folder / "spec.yaml", "--json")
    assert ran.code == 0, ran.err
    return folder, ran


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    path = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert_adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model

    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    path = tmp_path_factory.mktemp("adapters") / "trained"
    adapted.save_pretrained(path)
    return path


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


# what is imported


HEAVY = (
    "torch transformers onnx onnx_ir onnxscript onnxruntime numpy safetensors peft pydantic ruamel "
    "adaptc.compiler adaptc.spec"
)
HELP = """
import sys
from adaptc.cli.app import main

sys.argv = ["adaptc", "--help"]
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "code",
    ["import adaptc", "import adaptc.cli.app", HELP],
    ids=["adaptc", "adaptc.cli.app", "--help"],
)
def test_what_starting_imports(code: str) -> None:
    ran = python(f"{code}\nimport sys\nprint('HEAVY', [m for m in '{HEAVY}'.split() if m in sys.modules])")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    "code",
    [
        "from adaptc.spec.spec import load; load({'adapt': [{'method': 'lora', 'target': '*', 'r': 4}]})",
        "from adaptc.spec.spec import schema_text; schema_text()",
        "from adaptc.methods.method import METHODS; list(METHODS)",
        "from adaptc.cli.starter import starter_spec",
    ],
    ids=["a spec", "the schema", "the methods", "a first spec"],
)
def test_what_needs_no_torch(code: str) -> None:
    ran = python(f"{code}\nimport sys\nprint('torch' in sys.modules)")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "False"


def test_help_names_every_command(cli: Callable[..., Ran]) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for command in ("compile", "plan", "init", "methods", "passes", "schema"):
        assert re.search(rf"\b{command}\b", ran.out), command


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_help_names_what_looks_at_artifacts(cli: Callable[..., Ran], command: str) -> None:
    assert re.search(rf"\b{command}\b", cli("--help").out)


# compile


def test_json_of_a_compile(compiled: tuple[Path, Ran]) -> None:
    folder, ran = compiled
    document = ran.json
    assert document["outputs"] == [str(folder / "out" / n) for n in ("model.onnx", "trainable", "adapter")]
    assert [entry["method"] for entry in document["plan"]["entries"]] == ["lora", "ia3"]
    for record in document["passes"]:
        assert {"name", "seconds", "nodes_before", "nodes_after"} <= set(record)
    assert [r["name"] for r in document["passes"]][:2] == ["insert-lora", "insert-ia3"]
    assert {p["name"] for p in document["proofs"]} >= {"fold", "onnx, folded", "torch artifact"}
    for proof in document["proofs"]:
        assert 0 <= proof["relative"] <= proof["tolerance"]
        assert proof["absolute"] >= 0


def test_what_a_compile_writes(compiled: tuple[Path, Ran]) -> None:
    folder, _ = compiled
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert written == {
        "spec.yaml", "out/model.onnx", "out/manifest.json", "out/trainable/program.pt2", "out/trainable/manifest.json",
        "out/adapter/adapters.json", "out/adapter/manifest.json",
        "out/adapter/default/adapter_config.json", "out/adapter/default/adapter_model.safetensors",
        "out/adapter/second/adapter_config.json", "out/adapter/second/adapter_model.safetensors",
    }  # fmt: skip


def test_words_of_a_compile(cli: Callable[..., Ran], small: Path) -> None:
    ran = cli("compile", small)
    assert ran.code == 0, ran.err
    assert f"wrote {small.parent / 'out/adapter'}" in ran.out
    assert "trainable" in ran.out
    assert "matches nothing" in ran.out
    assert "writing peft" in ran.err


def test_output_dir(cli: Callable[..., Ran], small: Path, tmp_path: Path) -> None:
    ran = cli("compile", small, "--output-dir", tmp_path / "elsewhere", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["outputs"] == [str(tmp_path / "elsewhere/out/adapter")]
    assert (tmp_path / "elsewhere/out/adapter/adapters.json").is_file()
    assert not (tmp_path / "out").exists()


def test_set(cli: Callable[..., Ran], small: Path, tmp_path: Path) -> None:
    ran = cli(
        "compile", small, "--json",
        "--set", "adapt.0.r=2", "--set", "base.args={width: 20}", "--set", "emit.0.path=other",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["plan"]["entries"][0]["sites"][0]["shape"] == [20, 16]
    config = json.loads((tmp_path / "other/default/adapter_config.json").read_text())
    assert config["r"] == 2
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    assert manifest["spec"]["adapt"][0]["r"] == 2
    assert small.read_text() == PEFT_ONLY


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_print_after(cli: Callable[..., Ran], small: Path, extra: list[str]) -> None:
    ran = cli("compile", small, "--print-after", "insert-lora", *extra)
    assert ran.code == 0, ran.err
    assert "after insert-lora:" in ran.err
    assert "query.lora_A.default.weight  float32[4, 16]" in ran.err
    assert "after insert-ia3:" not in ran.err
    if extra:
        assert ran.json["outputs"]


def test_print_after_all(cli: Callable[..., Ran], small: Path) -> None:
    ran = cli("compile", small, "--print-after", "all")
    assert re.findall(r"^after (.*):$", ran.err, re.MULTILINE)[:3] == ["trace", "insert-lora", "insert-ia3"]
    assert max(map(len, ran.err.splitlines())) < 200, "a line does not fit on a screen"


def test_print_after_a_pass_that_did_not_run(cli: Callable[..., Ran], small: Path) -> None:
    """Nothing is folded for a checkpoint; the person who waits for that graph is told."""
    ran = cli("compile", small, "--print-after", "fold")
    assert "fold" in ran.err


def test_dump_graphs(cli: Callable[..., Ran], spec: Path, tmp_path: Path) -> None:
    ran = cli("compile", spec, "--dump-graphs", tmp_path / "graphs", "--json")
    assert ran.code == 0, ran.err
    files = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert files[:3] == ["00-trace.txt", "01-insert-lora.txt", "02-insert-ia3.txt"]
    assert {name.partition("-")[2] for name in files} >= {"fold.txt", "factor.txt"}
    assert [r["name"] for r in ran.json["passes"]] == [
        name[3:-4] for name in files if not name.endswith("trace.txt")
    ]
    text = (tmp_path / "graphs/00-trace.txt").read_text()
    assert "aten.linear" in text
    assert "# query" in text
    assert "lora" not in text
    folded = next(name for name in files if name.endswith("-fold.txt"))
    assert "lora" not in (tmp_path / "graphs" / folded).read_text()


# the manifest


@pytest.fixture(scope="module")
def manifests(compiled: tuple[Path, Ran]) -> dict[str, dict[str, Any]]:
    folder = compiled[0] / "out"
    where = {"onnx": folder, "torch": folder / "trainable", "peft": folder / "adapter"}
    return {name: json.loads((path / "manifest.json").read_text()) for name, path in where.items()}


@pytest.mark.parametrize("form", ["onnx", "torch", "peft"])
def test_manifest(manifests: dict[str, dict[str, Any]], form: str) -> None:
    manifest = manifests[form]
    assert manifest["versions"]["adaptc"] == "0.1.0"
    assert manifest["versions"]["torch"] == version(
        "torch"
    )  # of the package: torch adds a suffix of its build
    assert "onnx" in manifest["versions"]

    assert manifest["spec"]["version"] == 1
    first, second = manifest["spec"]["adapt"]
    assert (first["method"], first["r"], first["alpha"], first["name"]) == ("lora", 4, 8.0, "default")
    assert (second["method"], second["name"]) == ("ia3", "second")
    assert manifest["spec"]["inputs"] == {"x": "float32[batch, 16]"}
    assert manifest["spec"]["seed"] == 0

    assert re.fullmatch("[0-9a-f]{64}", manifest["base"]["sha256"])
    assert "cli_models:build" in manifest["base"]["model"]

    sites = {site["module"]: site for site in manifest["sites"]}
    assert set(sites) == {"query", "value"}
    assert sites["query"]["methods"] == ["lora", "ia3"]
    assert sites["value"]["methods"] == ["lora"]
    assert sites["query"]["shape"] == [12, 16]

    assert [record["name"] for record in manifest["passes"]][:2] == ["insert-lora", "insert-ia3"]
    for record in manifest["passes"]:
        assert record["seconds"] >= 0
        assert record["nodes_before"] > 0
        assert record["nodes_after"] > 0

    for proof in [*manifest["proofs"], *(p["proof"] for p in manifest["products"].values() if "proof" in p)]:
        assert 0 <= proof["relative"] <= proof["tolerance"]
        assert proof["absolute"] >= 0


def test_manifest_holds_the_proof_of_its_product(manifests: dict[str, dict[str, Any]]) -> None:
    onnx = manifests["onnx"]["products"]["model.onnx"]
    assert onnx["proof"]["name"] == "onnx, folded"
    assert onnx["operations"]["base"] == onnx["operations"]["folded"]
    assert {"fold", "fold, random adapters"} <= {proof["name"] for proof in manifests["onnx"]["proofs"]}
    assert manifests["torch"]["products"]["program.pt2"]["proof"]["name"] == "torch artifact"


@pytest.mark.parametrize("form", ["onnx", "torch", "peft"])
def test_hashes_of_files(compiled: tuple[Path, Ran], manifests: dict[str, dict[str, Any]], form: str) -> None:
    """What `sha256sum` prints, for every file of a product."""
    folder = compiled[0] / "out" / {"onnx": "", "torch": "trainable", "peft": "adapter"}[form]
    described = {n: f for p in manifests[form]["products"].values() for n, f in p["files"].items()}
    found = {
        str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    expected = {
        "onnx": {"model.onnx"},
        "torch": {"program.pt2"},
        "peft": set(found),  # two adapters: names of files stand twice, in two folders
    }[form]
    assert set(described) == expected
    for name, what in described.items():
        data = found[name].read_bytes()
        assert what["bytes"] == len(data)
        assert what["sha256"] == hashlib.sha256(data).hexdigest(), name


def test_hash_of_a_base_of_one_file(
    cli: Callable[..., Ran], bert: Path, bert_adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"version: 1\nbase: {{model: {bert}, task: sequence-classification}}\n"
        f"adapt:\n  - adapter: {bert_adapter}\nemit: [{{format: peft, path: a}}]\n"
    )
    ran = cli("compile", path, "--json")
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["base"]["sha256"] == hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert [a["path"] for a in manifest["adapters"]] == [str(bert_adapter)]
    assert re.fullmatch("[0-9a-f]{64}", manifest["adapters"][0]["sha256"])


# plan


def test_json_of_a_plan(cli: Callable[..., Ran], spec: Path) -> None:
    ran = cli("plan", spec, "--json")
    assert ran.code == 0, ran.err
    plan = ran.json
    first = plan["entries"][0]
    assert first["method"] == "lora"
    assert first["adapter"] == "default"
    assert [site["module"] for site in first["sites"]] == ["query", "value"]
    assert first["sites"][0]["source"] == "cli_models.py:12"
    assert first["unused_patterns"] == ["*.qurey"]
    assert "query" in first["near_misses"]
    assert plan["passes"] == ["insert"]
    assert plan["pipeline"] == ["insert-lora", "insert-ia3"]
    budget = plan["budget"]
    assert budget["parameters"] == 12 * 16 + 12 + 16 * 12 + 16
    assert budget["trainable"] == 4 * (16 + 12) * 2 + 12
    assert budget["trainable_share"] == pytest.approx(budget["trainable"] / budget["parameters"])
    assert budget["run_bytes"] >= 4 * budget["parameters"]
    assert list(spec.parent.iterdir()) == [spec], "plan wrote something"


def test_words_of_a_plan(cli: Callable[..., Ran], spec: Path) -> None:
    ran = cli("plan", spec)
    assert ran.code == 0
    for words in (
        "query",
        "value",
        "trainable",
        "insert-lora > insert-ia3",
        "passes:     [insert]",
        "*.qurey",
        "cli_models.py:12",
    ):
        assert words in ran.out, words


def test_plan_is_the_pipeline_in_force(cli: Callable[..., Ran], small: Path) -> None:
    """What `plan` prints as passes can be written into the spec, and changes nothing."""
    before = cli("plan", small, "--json").json
    again = cli("plan", small, "--json", "--set", "passes=[insert]").json
    assert again == before


@pytest.mark.slow
def test_a_process_prints_json_and_nothing_else(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cli_models.py").write_text(MODEL)
    ran = python(
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['adaptc', 'compile', sys.argv[2], '--json']\n"
        "from adaptc.cli.app import main; main()",
        str(tmp_path), str(small),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["outputs"]
    assert "Warning" not in ran.stderr, "torch's own warnings reach the user"


# the registries


def test_schemes(cli: Callable[..., Ran]) -> None:
    from adaptc.quantization.scheme import SCHEMES

    rows = cli("schemes", "--json").json
    assert {row["scheme"] for row in rows} == set(SCHEMES)
    assert all(row["equation"] and row["options"] for row in rows)
    assert "nf4" in cli("schemes").out


def test_a_compile_with_a_report(cli: Callable[..., Ran], small: Path) -> None:
    ran = cli("compile", small, "--report", "--json")
    assert ran.json["outputs"][-1] == str(small.parent / "out/adapter/report.html")
    assert "query" in Path(ran.json["outputs"][-1]).read_text()


def test_methods(cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.methods.method import METHODS

    rows = cli("methods", "--json").json
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert row["equation"], row
        assert row["options"], row
    monkeypatch.setenv("COLUMNS", "250")
    text = cli("methods")
    assert text.code == 0
    assert "W' = W + (alpha / r) B A" in " ".join(text.out.split())


def test_passes(cli: Callable[..., Ran]) -> None:
    from adaptc.rewriter.catalog import load_passes

    rows = cli("passes", "--json").json
    assert {row["pass"] for row in rows} == set(load_passes())
    assert all(row["does"] and row["takes"] and row["leaves"] for row in rows)
    assert "insert-lora" in cli("passes").out


def test_schema(cli: Callable[..., Ran]) -> None:
    import jsonschema

    ran = cli("schema")
    assert ran.code == 0
    jsonschema.Draft202012Validator.check_schema(ran.json)
    validator = jsonschema.Draft202012Validator(ran.json)
    from ruamel.yaml import YAML

    assert not list(validator.iter_errors(YAML(typ="safe").load(SPEC)))


# init


def test_init_for_a_model(cli: Callable[..., Ran], bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "specs" / "first.yaml"
    path.parent.mkdir()
    made = cli("init", bert, "--output", path)
    assert made.code == 0, made.err
    assert made.out == ""
    text = path.read_text()
    assert "task: sequence-classification" in text
    assert "#" in text
    planned = cli("plan", path, "--json")
    assert planned.code == 0, planned.err
    modules = [site["module"] for site in planned.json["entries"][0]["sites"]]
    assert "bert.encoder.layer.1.attention.self.query" in modules
    assert "classifier" not in modules


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param("roberta", "sequence-classification", marks=pytest.mark.slow),
        pytest.param("whisper", "speech-seq2seq", marks=pytest.mark.slow),
        pytest.param("bart", "seq2seq-lm", marks=pytest.mark.slow),
    ],
)
def test_init_knows_the_task_of_a_family(
    cli: Callable[..., Ran], tmp_path: Path, name: str, task: str
) -> None:
    MODELS[name].build().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    made = cli("init", tmp_path / "model", "--output", tmp_path / "spec.yaml")
    assert made.code == 0, made.err
    assert f"task: {task} " in (tmp_path / "spec.yaml").read_text()
    planned = cli("plan", tmp_path / "spec.yaml")
    assert planned.code == 0, planned.err


@pytest.mark.slow
def test_the_first_spec_of_a_model_compiles(cli: Callable[..., Ran], bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    assert cli("init", bert, "--output", path).code == 0
    ran = cli("compile", path)
    assert ran.code == 0, ran.err
    assert (tmp_path / "build/trainable/program.pt2").is_file()


def test_init_for_an_adapter(cli: Callable[..., Ran], bert: Path, bert_adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    made = cli("init", bert, "--adapter", bert_adapter)
    assert made.code == 0, made.err
    path.write_text(made.out)
    made = cli("init", bert, "--adapter", bert_adapter, "--output", tmp_path / "other.yaml")
    assert made.code == 0, made.err
    ran = cli("compile", tmp_path / "other.yaml", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["outputs"] == [str(tmp_path / "build/model.onnx")]
    assert ran.json["plan"]["entries"][0]["checkpoint"] is not None


@pytest.mark.slow
def test_init_for_an_adapter_on_a_quantized_base(cli: Callable[..., Ran], tmp_path: Path) -> None:
    import adaptc

    base = Path(__file__).parents[1] / "data" / "quantized" / "gptq"
    spec = {
        "base": {"model": str(base), "task": "causal-lm"},
        "adapt": [{"method": "lora", "target": "*.q_proj"}],
    }
    adaptc.compile(spec).save_adapter(tmp_path / "adapter")
    made = cli("init", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "spec.yaml")
    assert made.code == 0, made.err
    ran = cli("compile", tmp_path / "spec.yaml", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["plan"]["quantize"][0]["scheme"].startswith("int4 ")
    shown = cli("inspect", base)
    assert "quant_method gptq" in " ".join(shown.out.split())


def test_init_does_not_overwrite(cli: Callable[..., Ran], bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("mine")
    ran = cli("init", bert, "--output", path)
    assert ran.code != 0
    assert f"{path} exists already" in ran.err
    assert path.read_text() == "mine"


def test_init_into_a_folder_that_is_missing(cli: Callable[..., Ran], bert: Path, tmp_path: Path) -> None:
    ran = cli("init", bert, "--output", tmp_path / "new" / "spec.yaml")
    assert "Traceback" not in ran.err
    assert (ran.code == 0) == (tmp_path / "new/spec.yaml").is_file()


def test_init_without_an_adapter_there(cli: Callable[..., Ran], bert: Path, tmp_path: Path) -> None:
    ran = cli("init", bert, "--adapter", tmp_path)
    assert ran.code == 2
    assert "no adapter_config.json there" in ran.err
    assert ran.out == ""
