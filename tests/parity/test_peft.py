"""PEFT's checkpoints, PEFT's outputs: read, computed, folded and written as PEFT does."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from tests.families import (
    FAMILIES,
    HUGGING_FACE,
    QUICK,
    SHAPES,
    Zoo,
    close,
    differs,
    inputs,
    outputs,
    perturb,
    without_cache,
)

peft = pytest.importorskip("peft")


@dataclass(frozen=True)
class Case:
    """A PEFT configuration, as a class and its options; `{}` placeholders are filled in by family."""

    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = HUGGING_FACE


FIRST_LAYER = {
    "llama": "model.layers.0.self_attn.q_proj",
    "gpt2": "h.0.attn.c_attn",
    "bert": "layer.0.attention.self.query",
    "t5": "encoder.block.0.layer.0.SelfAttention.q",
}
PATTERN = {"llama": r".*layers\.1.*down_proj", "gpt2": r"h.1.mlp.c_fc", "bert": r"layer.1.*dense", "t5": "wo"}
TARGETS = {
    name: [p.removeprefix("*.").removeprefix("*") for p in FAMILIES[name].target] for name in HUGGING_FACE
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TARGETS |= dict.fromkeys(("llama", "qwen3", "mistral", "gemma2"), EVERY)
TARGETS["mixtral"] = ATTENTION
FEEDFORWARD = {name: [p.removeprefix("*.") for p in FAMILIES[name].feedforward] for name in HUGGING_FACE}
FIRST = ("llama", "gpt2", "bert", "t5")
CASES = {
    "lora": Case("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": Case("LoraConfig", {"r": 4, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}, FIRST),
    "patterns": Case(
        "LoraConfig",
        {"r": 4, "lora_alpha": 8, "rank_pattern": "{rank}", "alpha_pattern": "{alpha}"},
        FIRST,
    ),
    "dora": Case("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "ia3": Case("IA3Config"),
    "saved-modules": Case(
        "LoraConfig", {"r": 4, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}, ("bert",)
    ),
    "dora-saved-modules": Case(
        "LoraConfig", {"r": 2, "use_dora": True, "modules_to_save": ["classifier", "pooler"]}, ("bert",)
    ),
    "saved-head": Case("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"]}, ("llama",)),
    "regex": Case("LoraConfig", {"r": 4, "target_modules": r".*\.(q|k|v|o)_proj"}, ("llama",)),
    "layers": Case("LoraConfig", {"r": 4, "layers_to_transform": [1]}, ("llama", "bert")),
    "all-linear": Case("LoraConfig", {"r": 4, "target_modules": "all-linear"}, ("llama", "gpt2")),
    "excluded": Case("LoraConfig", {"r": 4, "exclude_modules": r".*\.0\..*"}, ("bert",)),
}
ONE = {
    "rslora": "bert",
    "patterns": "gpt2",
    "dora": "llama",
    "ia3": "gpt2",
    "layers": "bert",
    "all-linear": "gpt2",
}
"""Case -> the base that stands for its others in the quick tests."""
PAIRS = [
    pytest.param(
        case,
        name,
        id=f"{case}-{name}",
        marks=[pytest.mark.slow] * (name not in QUICK or name != ONE.get(case, name)),
    )
    for case in CASES
    for name in CASES[case].bases
]


MERGED = [
    pytest.param(
        *pair.values,
        id=pair.id,
        marks=pair.marks
        or [pytest.mark.slow] * (pair.values[0] not in ("lora", "dora", "ia3", "saved-modules")),
    )
    for pair in PAIRS
]
"""The cases that differ in the layers they take only are merged among the slow ones."""


@dataclass
class Pair:
    """One adapter, in PEFT and in adaptc."""

    name: str
    theirs: nn.Module
    directory: Path
    ours: Compiled


def config_of(case: str, name: str) -> Any:
    given = dict(CASES[case].options)
    given.setdefault("target_modules", TARGETS[name])
    if CASES[case].cls == "IA3Config":
        given |= {
            "target_modules": [*TARGETS[name], *FEEDFORWARD[name]],
            "feedforward_modules": FEEDFORWARD[name],
            "fan_in_fan_out": name == "gpt2",
        }
    if "rank_pattern" in given:
        given["rank_pattern"] = {FIRST_LAYER[name]: 2, PATTERN[name]: 3}
        given["alpha_pattern"] = {PATTERN[name]: 5}
    return getattr(peft, CASES[case].cls)(**given)


@pytest.fixture(scope="module")
def pairs(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], Pair] = {}

    def pair(case: str, name: str) -> Pair:
        if (case, name) not in made:
            directory = tmp_path_factory.mktemp(f"{case}-{name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = peft.get_peft_model(zoo.fresh(name), config_of(case, name))
            perturb(theirs)
            theirs.save_pretrained(directory)
            ours = zoo.compiled(name, [{"adapter": str(directory)}])
            made[case, name] = Pair(name, theirs.eval(), directory, ours)
        return made[case, name]

    return pair


def theirs_on(
    pair: Pair, tensors: dict[str, torch.Tensor], model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        module = model or pair.theirs
        return outputs(module, tensors, pair.ours.base.outputs, **without_cache(module.base_model))


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_outputs_are_pefts(zoo: Zoo, pairs: Any, case: str, name: str) -> None:
    pair = pairs(case, name)
    module = pair.ours.module.eval()
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        want = theirs_on(pair, tensors)
        with torch.no_grad():
            got = outputs(module, tensors, pair.ours.base.outputs)
        for key in want:
            close(got[key], want[key])
        if number == 0:
            with torch.no_grad():
                differs(want["logits"], zoo.run_eager(name, tensors)["logits"])


@pytest.mark.parametrize(("case", "name"), MERGED)
def test_the_fold_is_pefts_merge(zoo: Zoo, pairs: Any, case: str, name: str) -> None:
    pair = pairs(case, name)
    folded = pair.ours.fold()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.PeftModel.from_pretrained(zoo.fresh(name), pair.directory)
        merged = twin.merge_and_unload().eval()
    tensors = inputs(name, 3, 6, pad=True)
    want = theirs_on(pair, tensors, merged)
    with torch.no_grad():
        got = outputs(folded, tensors, pair.ours.base.outputs)
    for key in want:
        close(got[key], want[key])
    state, theirs = folded.state_dict(), merged.state_dict()
    assert list(state) == list(theirs)
    for key, value in theirs.items():
        close(state[key], value, 16)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_what_is_saved_loads_in_peft(zoo: Zoo, pairs: Any, case: str, name: str, tmp_path: Path) -> None:
    pair = pairs(case, name)
    pair.ours.save_adapter(tmp_path)
    ours, theirs = tensors_in(tmp_path), tensors_in(pair.directory)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = peft.PeftModel.from_pretrained(zoo.fresh(name), tmp_path).eval()
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    tensors = inputs(name, 2, 5, pad=True)
    want, got = theirs_on(pair, tensors), theirs_on(pair, tensors, twin)
    for key in want:
        close(got[key], want[key])
    written, known = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, pair.directory))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout"):
        assert written.get(key) == known.get(key), key


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(
            method, name, marks=[pytest.mark.slow] * (name not in QUICK or name != ONE.get(method, name))
        )
        for method in ("lora", "dora", "ia3")
        for name in HUGGING_FACE
    ],
)
def test_an_adapter_made_here_is_one_peft_makes(zoo: Zoo, name: str, method: str, tmp_path: Path) -> None:
    """The other direction: inserted by adaptc, trained (here: perturbed), opened in PEFT."""
    compiled = zoo.adapted(method, name)
    compiled.save_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.PeftModel.from_pretrained(zoo.fresh(name), tmp_path).eval()
    more = without_cache(zoo.eager(name))
    for batch, length in SHAPES[:2]:
        tensors = inputs(name, batch, length, pad=batch > 1)
        with torch.no_grad():
            want = outputs(twin, tensors, compiled.graph.outputs, **more)
            got = outputs(compiled.module.eval(), tensors, compiled.graph.outputs)
        for key in want:
            close(got[key], want[key])
    twin.save_pretrained(tmp_path / "again")
    assert set(tensors_in(tmp_path / "again")) == set(tensors_in(tmp_path))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_initial_values_are_pefts(zoo: Zoo, method: str) -> None:
    """Same distribution: zeros where PEFT has zeros, ones where ones, and the same spread elsewhere."""
    name = "bert"
    compiled = zoo.initial(method, name)
    case = "ia3" if method == "ia3" else method
    theirs = peft.get_peft_model(zoo.fresh(name), config_of(case, name))
    for key, value in theirs.named_parameters():
        own = key.removeprefix("base_model.model.")
        if not value.requires_grad or own not in dict(compiled.module.named_parameters()):
            continue
        ours = compiled.graph.weights[own].load()
        if value.std() == 0:
            assert torch.equal(ours, value), key
        elif "magnitude" in key:
            close(ours, value, 8)
        else:
            assert 0.7 < (ours.std() / value.std()).item() < 1.4, key


def test_adapter_name_and_load_into_a_module(zoo: Zoo, pairs: Any, tmp_path: Path) -> None:
    """A PEFT checkpoint goes into a module that was compiled without it, and not into another one."""
    pair = pairs("lora", "bert")
    compiled = zoo.compiled(
        "bert",
        [{"method": "lora", "name": "mine", "target": ["*.query", "*.value", "*.dense"], "r": 4, "alpha": 6}],
    )
    compiled.load_adapter(pair.directory)
    tensors = inputs("bert", 2, 5)
    with torch.no_grad():
        close(compiled.module.eval()(**tensors)["logits"], theirs_on(pair, tensors)["logits"])
    for wrong in (pairs("patterns", "bert"), pairs("dora", "bert"), pairs("lora", "gpt2")):
        before = {k: v.clone() for k, v in compiled.module.state_dict().items()}
        with pytest.raises(adaptc.AdaptcError):
            compiled.load_adapter(wrong.directory)
        assert all(torch.equal(v, before[k]) for k, v in compiled.module.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "corda"},
        {"layer_replication": [[0, 2]]},
        {"use_dora": True, "lora_bias": True},
        {"trainable_token_indices": [1]},
    ],
    ids=lambda o: next(iter(o)) if len(o) == 1 else "lora_bias",
)
def test_what_is_not_read_is_refused(zoo: Zoo, pairs: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """An option that would change the outputs is never passed over in silence."""
    source = pairs("lora", "bert").directory
    for file in source.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | options))
    with pytest.raises(
        adaptc.AdaptcError, match=next(k for k in options if k != "use_dora").split("_lora")[0]
    ):
        zoo.compiled("bert", [{"adapter": str(tmp_path)}])
