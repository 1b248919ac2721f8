"""What a written product holds: programs, configurations and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir
import torch
from safetensors.torch import load_file
from torch import fx

import adaptc
from tests.replay.modules import module_tensors, program_text
from tests.replay.onnx_programs import onnx_tensors, onnx_text
from tests.replay.plain_data import manifest_text


def product_texts(
    name: str, path: Path, module: fx.GraphModule
) -> Iterator[tuple[str, str | Mapping[str, torch.Tensor]]]:
    """What a product holds: its programs and configurations as text, its tensors by name.

    Args:
        name: what the product is called in the record.
        path: the file or folder that was written.
        module: the trainable module; a torch program is told against it.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    yield f"{name} files", "\n".join(str(file.relative_to(folder)) for file in files)
    for file in files:
        label = f"{name} {file.relative_to(folder)}"
        if file.suffix == ".pt2":
            loaded = adaptc.load(folder)
            yield label, program_text(loaded, module)
            yield f"{label} tensors", module_tensors(loaded)
        elif file.suffix == ".onnx":
            model = onnx_ir.load(file)
            yield label, onnx_text(model)
            yield f"{label} tensors", onnx_tensors(model)
        elif file.suffix == ".safetensors":
            yield f"{label} tensors", load_file(file)
        elif file.name == "manifest.json":
            yield label, manifest_text(json.loads(file.read_text()))
        elif file.name in ("config.json", "adapter_config.json"):
            yield label, file.read_text()
