"""Small bases, small adapters, and the command line called in this process."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.command_line import Ran, run

MODELS = """\
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.query(x)) * self.value(x)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Wrapped(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = Net(width)

    def forward(self, x):
        return self.encoder(x).tanh()


class Curved(Wrapped):
    def forward(self, x):
        return torch.erf(self.encoder(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = self.layer(x)
        if y.sum() > 0:  # the data decides
            return y
        return -y


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Linear(16, 16)
        self.spare = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16)

    def forward(self, x):
        return self.main(x) + self.frozen(x).detach()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 99, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)))


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(16)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x, y):
        return self.layer(x)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x.reshape(3, 16))


def _seeded(make, *args, seed=0):
    torch.manual_seed(seed)
    return make(*args)


def build(width=16, seed=0):
    return _seeded(Net, width, seed=seed)


def wrapped(width=16, seed=0):
    return _seeded(Wrapped, width, seed=seed)


def curved(width=16, seed=0):
    return _seeded(Curved, width, seed=seed)


def branching():
    return Branching()


def unused():
    return Unused()


def tied():
    return _seeded(Tied)


def two_inputs():
    return TwoInputs()


def labelled():
    return _seeded(Labelled)


def embedded():
    return _seeded(Embedded)


def fixed_batch():
    return FixedBatch()


def no_module():
    return {"not": "a module"}


def broken():
    raise RuntimeError("the weights are on the moon")


NUMBER = 3
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a user's own models, importable as `message_models`."""
    folder = tmp_path_factory.mktemp("models")
    file = folder / "message_models.py"
    file.write_text(MODELS)
    sys.path.insert(0, str(folder))
    yield file
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def cli(models: Path) -> Callable[..., Ran]:
    """Run `adaptc` in this process, where `message_models` can be imported."""
    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a spec (indentation is taken off) and give its path."""

    def put(text: str) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text("version: 1\n" + textwrap.dedent(text))
        return path

    return put


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of two layers, every weight random and none zero."""
    import transformers

    path = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def peft_adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a LoRA of a model as PEFT does, every weight random."""
    from peft import LoraConfig, get_peft_model

    def save(model: torch.nn.Module, name: str = "adapter", safe: bool = True) -> Path:
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.05)
        path = tmp_path_factory.mktemp("peft") / name
        adapted.save_pretrained(path, safe_serialization=safe)
        return path

    return save


@pytest.fixture(scope="session")
def trained(models: Path, peft_adapter: Callable[..., Path]) -> Path:
    """A LoRA of `message_models:build`; tests change a copy."""
    import message_models

    return peft_adapter(message_models.build())


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained adapter, beside the spec, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def configure(adapter: Path) -> Callable[..., None]:
    """Change keys of the adapter's configuration."""

    def change(**values: object) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2))

    return change
