"""Every method that PEFT has: its checkpoints, its outputs, its merges."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptc.compiler.compiled import Compiled
from adaptc.methods.method import METHODS
from tests.families import SHAPES, Zoo, close, differs, inputs, outputs, perturb, without_cache
from tests.parity.test_peft import tensors_in

peft = pytest.importorskip("peft")
DECODER = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TARGETS: dict[str, Any] = {
    "llama": DECODER,
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
    "resnet": ["convolution"],
}
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings"}
NORMS = {
    "llama": ["input_layernorm", "norm"],
    "bert": ["LayerNorm"],
    "t5": ["layer_norm"],
    "vit": ["layernorm_before"],
}
LINEAR, TRANSPOSED, CONVOLUTION = ("llama", "bert", "t5", "vit"), ("gpt2",), ("resnet",)
QUICK = ("llama", "bert")


@dataclass(frozen=True)
class Case:
    """A PEFT configuration of one of our methods, and the bases that PEFT takes it on."""

    method: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = LINEAR


CASES = {
    "adalora": Case(
        "adalora", "AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 9, "lora_alpha": 6},
        LINEAR + TRANSPOSED + CONVOLUTION,
    ),
    "boft": Case("boft", "BOFTConfig", {"boft_block_size": 4}, LINEAR),
    "c3a": Case("c3a", "C3AConfig", {"block_size": 8}),
    "delora": Case("delora", "DeloraConfig", {"r": 4, "delora_lambda": 9}),
    "fourierft": Case("fourierft", "FourierFTConfig", {"n_frequency": 50}, LINEAR + TRANSPOSED),
    "gralora": Case("gralora", "GraloraConfig", {"r": 4, "alpha": 6}, LINEAR + TRANSPOSED),
    "gralora-hybrid": Case("gralora", "GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 3}, ("bert",)),
    "hira": Case("hira", "HiraConfig", {"r": 4}, LINEAR + TRANSPOSED + CONVOLUTION),
    "hra": Case("hra", "HRAConfig", {"r": 4}),
    "hra-orthogonal": Case("hra", "HRAConfig", {"r": 4, "apply_GS": True}, ("bert",)),
    "layernorm": Case("layernorm", "LNTuningConfig"),
    "loha": Case("loha", "LoHaConfig", {"r": 4, "alpha": 6}, LINEAR + CONVOLUTION),
    "loha-kernels": Case("loha", "LoHaConfig", {"r": 2, "use_effective_conv2d": True}, CONVOLUTION),
    "lokr": Case("lokr", "LoKrConfig", {"r": 2, "alpha": 6}, LINEAR + CONVOLUTION),
    "lokr-whole": Case("lokr", "LoKrConfig", {"r": 16, "alpha": 6}, ("bert", "resnet")),
    "lokr-both": Case("lokr", "LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}, ("bert",)),
    "lokr-kernels": Case("lokr", "LoKrConfig", {"r": 1, "use_effective_conv2d": True}, CONVOLUTION),
    "lora-pissa": Case("lora", "LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "lora-olora": Case("lora", "LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora"}),
    "lora-orthogonal": Case("lora", "LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}, ("bert",)),
    "miss": Case("miss", "MissConfig", {"r": 6}),
    "miss-bat": Case("miss", "MissConfig", {"r": 8, "init_weights": "bat"}, QUICK),
    "miss-mini": Case("miss", "MissConfig", {"r": 8, "mini_r": 4, "init_weights": "mini"}, QUICK),
    "oft": Case("oft", "OFTConfig", {"oft_block_size": 8}),
    "oft-exact": Case("oft", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}, QUICK),
    "oft-terms": Case("oft", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}, ("bert",)),
    "oft-held": Case("oft", "OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.5}, ("bert",)),
    "oft-shared": Case("oft", "OFTConfig", {"oft_block_size": 0, "r": 4, "block_share": True}, ("bert",)),
    "oft-adjusted": Case("oft", "OFTConfig", {"oft_block_size": 7}, ("bert",)),
    "randlora": Case("randlora", "RandLoraConfig", {"r": 4, "randlora_alpha": 8}, LINEAR + TRANSPOSED),
    "randlora-sparse": Case("randlora", "RandLoraConfig", {"r": 4, "sparse": True}, ("bert",)),
    "randlora-drawn": Case("randlora", "RandLoraConfig", {"r": 5, "save_projection": False}, ("bert",)),
    "road": Case("road", "RoadConfig", {"group_size": 8}),
    "road-2": Case("road", "RoadConfig", {"group_size": 8, "variant": "road_2"}, ("bert",)),
    "road-4": Case("road", "RoadConfig", {"group_size": 8, "variant": "road_4"}, ("bert",)),
    "shira": Case("shira", "ShiraConfig", {"r": 2, "random_seed": 3}),
    "trainable-tokens": Case("trainable-tokens", "TrainableTokensConfig", {"token_indices": [1, 5, 7]}, QUICK),
    "vblora": Case(
        "vblora", "VBLoRAConfig", {"r": 2, "vector_length": 8, "num_vectors": 10}, LINEAR + TRANSPOSED
    ),
    "vera": Case("vera", "VeraConfig", {"r": 8}, LINEAR + TRANSPOSED),
    "vera-drawn": Case("vera", "VeraConfig", {"r": 8, "save_projection": False}, ("llama",)),
}  # fmt: skip


def quick(case: str, name: str) -> bool:
    """Whether it stands for the others: the first case of a method, on the first base that it has of `QUICK`."""
    about = CASES[case]
    first = next(other for other in CASES if CASES[other].method == about.method)
    return case == first and name == next((base for base in about.bases if base in QUICK), "")


PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.slow] * (not quick(case, name)))
    for case, about in CASES.items()
    for name in about.bases
]


@dataclass
class Pair:
    """One adapter, in PEFT and in adaptc."""

    theirs: nn.Module
    directory: Path
    ours: Compiled


def config_of(case: str, name: str) -> Any:
    about = CASES[case]
    target = {"trainable-tokens": [EMBEDDINGS.get(name)], "layernorm": NORMS.get(name)}.get(about.method)
    return getattr(peft, about.cls)(target_modules=target or TARGETS[name], **about.options)


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
            made[case, name] = Pair(theirs.eval(), directory, ours)
        return made[case, name]

    return pair


def run_peft(ours: Compiled, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return outputs(model, tensors, ours.base.outputs, **without_cache(model.get_base_model()))


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_outputs_are_pefts(zoo: Zoo, pairs: Any, case: str, name: str) -> None:
    pair = pairs(case, name)
    assert {a.method.name for a in pair.ours.graph.adaptations} == {CASES[case].method}
    module, folded = pair.ours.module.eval(), pair.ours.fold()
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        if "ids" in str(tensors):
            tensors["input_ids"][0, 0] = 5
        want = run_peft(pair.ours, pair.theirs, tensors)
        with torch.no_grad():
            live, merged = (outputs(m, tensors, pair.ours.base.outputs) for m in (module, folded))
        for key in want:
            close(live[key], want[key])
            close(merged[key], want[key])
        if number == 0:
            differs(want["logits"], zoo.run_eager(name, tensors)["logits"])


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_what_is_saved_loads_in_peft(zoo: Zoo, pairs: Any, case: str, name: str, tmp_path: Path) -> None:
    pair = pairs(case, name)
    pair.ours.save_adapter(tmp_path)
    ours, theirs = tensors_in(tmp_path), tensors_in(pair.directory)
    repeated = {key for key in theirs if "randlora_A" in key or "randlora_B" in key} - set(ours)
    assert set(ours) == set(theirs) - repeated
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    known = json.loads((pair.directory / "adapter_config.json").read_text())
    cls = METHODS[CASES[case].method]
    assert cls.peft is not None
    for key in ("peft_type", *cls.peft.options.values()):
        if known[key] == "orthogonal":
            continue  # it leaves no trace in a trained adapter
        assert config[key] == known[key] or not (config[key] or known[key]), key
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = peft.PeftModel.from_pretrained(zoo.fresh(name), tmp_path).eval()
    # PEFT writes RandLoRA's bases once more for each layer, and misses these copies, though all layers share one.
    assert repeated or not [w for w in caught if "missing" in str(w.message).lower()]
    tensors = inputs(name, 2, 5, pad=True)
    want, got = (run_peft(pair.ours, model, tensors) for model in (pair.theirs, twin))
    for key in want:
        close(got[key], want[key])
