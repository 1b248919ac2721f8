"""Every spec in specs/ compiles as it stands, but for a small base in place of MiniLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.artifacts import emit_all
from adaptc.compiler import make_base
from adaptc.graph import Graph
from adaptc.method_contract import METHODS
from adaptc.plan import make_plan
from adaptc.spec import load
from adaptc.tracing.graph import trace
from adaptc.yaml_text import flow

ROOT = Path(__file__).parent.parent
SPECS = sorted(ROOT.glob("specs/*.yaml"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    model = BertModel(BertConfig(vocab_size=3000, **small))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    directory = tmp_path_factory.mktemp("bert")
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({"[UNK]": 0, "is": 1, "this": 2, "review": 3, "positive": 4}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    model = get_peft_model(BertModel.from_pretrained(bert), LoraConfig(r=2, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(0, 0.1)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(directory))
    return directory


def overrides_of(path: Path, bert: Path, adapter: Path) -> list[str]:
    """The settings that put small files in place of those that a spec names."""
    overrides = []
    if "all-MiniLM" in path.read_text():
        overrides.append(f"base.model={bert}")
    if "my-peft-adapter" in path.read_text():
        overrides.append(f"adapt.0.adapter={adapter}")
    if path.stem == "qalora":
        overrides.append("adapt.0.r=2")  # the small base has no more groups
    return overrides


QUICK = (
    "own-model",
    "peft-to-huggingface",
    "peft-to-onnx",
    "sentiment",
)
"""The journeys; of the methods each has its laws."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in QUICK)) for p in SPECS],
)
def test_spec_compiles(
    path: Path, bert: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    compiled = adaptc.compile(path, overrides=overrides_of(path, bert, adapter))
    artifacts = emit_all(compiled.program, compiled.spec.emit, into=tmp_path)
    assert artifacts
    assert all(artifact.path.exists() for artifact in artifacts)
    for manifest in tmp_path.rglob("manifest.json"):
        for product in json.loads(manifest.read_text())["products"].values():
            if "proof" in product:
                assert 0 <= product["proof"]["relative"] <= product["proof"]["tolerance"]


@pytest.fixture(scope="module")
def traced() -> dict[str, Graph]:
    """The graphs of the bases that specs name, each traced once."""
    return {}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in (*QUICK, "int8"))) for p in SPECS],
)
def test_the_pipeline_that_plan_prints_can_be_pasted(
    path: Path, bert: Path, adapter: Path, traced: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = overrides_of(path, bert, adapter)
    spec = load(path, overrides)
    key = repr((spec.base, spec.inputs))
    if key not in traced:
        traced[key] = trace(make_base(spec))
    plan = make_plan(spec, traced[key])
    printed = flow(plan.stated)
    again = make_plan(load(path, [*overrides, f"passes={printed}"]), traced[key])
    assert [(item.name, item.stated()) for item in again.passes] == [
        (item.name, item.stated()) for item in plan.passes
    ]
    assert len(again.closing) == len(plan.closing)
    assert flow(again.stated) == printed


def test_every_method_has_a_spec() -> None:
    assert {name for name, cls in METHODS.items() if cls.__module__.startswith("adaptc.")} <= {
        p.stem for p in SPECS
    }


def test_the_own_model_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    compiled = adaptc.compile(ROOT / "specs" / "own-model.yaml")
    module = compiled.module
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    x, y = torch.randn(64, 24), torch.randint(0, 5, (64,))
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(module(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    compiled.save_adapter(tmp_path / "a")
    before = module.eval()(x)
    other = adaptc.compile(ROOT / "specs" / "own-model.yaml")
    other.load_adapter(tmp_path / "a")
    assert torch.equal(other.module.eval()(x), before)
