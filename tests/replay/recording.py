"""A replay: a spec compiled, its products written, and all there is to see kept as named texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import adaptc
from tests.replay.modules import graph_text, module_tensors, module_text
from tests.replay.plain_data import plain_text
from tests.replay.products import product_texts
from tests.replay.sections import Sections
from tests.replay.tensors import tensors_text


class Recording:
    """Named texts, without what differs from run to run.

    Attributes:
        texts: the name of a text -> the text. A name that comes again gets a number.
    """

    def __init__(self, paths: Mapping[Path, str]):
        self.texts: Sections = {}
        self._paths = paths

    def add(self, name: str, found: str | Mapping[str, torch.Tensor]) -> None:
        """Keep a text, or tensors by their names."""
        text = found if isinstance(found, str) else tensors_text(found)
        for path, word in self._paths.items():
            text = text.replace(str(path), word)
        text = re.sub(r"[^\s\"]*/site-packages/", "", text)
        text = re.sub(
            r"(\bmodeling_\w+\.py):\d+", r"\1", text
        )  # as this and the next are in each transformers
        text = re.sub(r"(transformers_version\"?(?: =|:) \")[\d.]+", r"\1", text)
        text = re.sub(r"\bencoder([._])layer[._](?=\d)", "L", text)  # to be short
        symbols = {
            symbol: f"size_{i}" for i, symbol in enumerate(dict.fromkeys(re.findall(r"\bs\d+\b", text)))
        }
        text = re.sub(r"\bs\d+\b", lambda match: symbols[match[0]], text)  # torch's own names of dimensions
        count = sum(other.partition(" #")[0] == name for other in self.texts)
        self.texts[f"{name} #{count + 1}" if count else name] = text

    def add_module(self, name: str, make: Callable[[], fx.GraphModule]) -> None:
        """Keep a module's graph and tensors, or why it cannot be made."""
        try:
            module = make()
        except adaptc.RefusedError as error:
            self.add(f"{name} refused", str(error))
            return
        self.add(name, module_text(module))
        self.add(f"{name} tensors", module_tensors(module))


def replay(
    spec: Path | Mapping[str, Any],
    overrides: Sequence[str],
    emit: Sequence[Mapping[str, Any]],
    folder: Path,
    paths: Mapping[Path, str],
) -> Sections:
    """Compile a spec and write its products.

    Args:
        spec: a file or a mapping.
        overrides: `--set` settings.
        emit: the `emit` entries of the spec.
        folder: where products go.
        paths: places on this machine -> the word that stands for each in the texts.
    """
    recording = Recording({folder: "OUT", **paths})
    compiled = adaptc.compile(
        spec,
        overrides=overrides,
        after=lambda name, graph: recording.add(f"after {name}", graph_text(graph.text())),
    )
    recording.add("plan", "\n".join(plain_text(compiled.plan.to_json())))
    recording.add_module("module", lambda: compiled.module)
    train_a_little(compiled.module)
    for index, entry in enumerate(emit):
        path = folder / str(index) / Path(entry["path"]).name
        compiled.emit(**{**entry, "path": path})
        check_proofs(path)
        for name, found in product_texts(f"emit {index} {entry['format']}", path, compiled.module):
            recording.add(name, found)
    if compiled.spec.quantize:
        recording.add_module("inference", compiled.inference)
    else:
        recording.add_module("fold", compiled.fold)
    return recording.texts


def train_a_little(module: fx.GraphModule) -> None:
    """Move the adapters, so that no zero in them hides what a fold does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.rand(parameter.shape, generator=generator) / 16 - 1 / 32


def check_proofs(path: Path) -> None:
    """Every proof that a product's manifest names holds."""
    manifest = (path if path.is_dir() else path.parent) / "manifest.json"
    for product in json.loads(manifest.read_text())["products"].values():
        if "proof" in product:
            assert 0 <= product["proof"]["relative"] <= product["proof"]["tolerance"]
