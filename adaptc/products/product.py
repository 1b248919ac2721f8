"""A product that runs: an ONNX program, a torch artifact or a Hugging Face checkpoint, called with named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from adaptc.compiler.proof.runners import module_call
from adaptc.emit.onnx.cached import read_inputs, read_outputs, read_signature
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.emit.torch import load_torch
from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.inputs import LABELS, InputSpec
from adaptc.products.listing import from_metadata, listed

Tensors = Mapping[str, torch.Tensor]
RUNNABLE = ("onnx", "torch", "hf")
"""The formats of products that are called with tensors. onnxruntime-genai alone runs its own directories."""
ADVICE = "expected what adaptc wrote: an ONNX program, a torch artifact, a Hugging Face checkpoint, or a folder of them"


@dataclass(frozen=True)
class Product:
    """A product that runs.

    Attributes:
        name: how tables call it: the file or folder, relative to what was asked for.
        path: its file or folder.
        format: `onnx`, `torch`, `hf` or `genai`.
        adapters: `none`, `live`, `folded`, `swap` or `rows`; "" where nothing says.
        quantized: whether weights are stored in few bits.
        entry: what its manifest says of it; empty for a program that another tool wrote.
    """

    name: str
    path: Path
    format: str
    adapters: str
    quantized: bool
    entry: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where paths of its manifest start."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def base(self) -> Mapping[str, Any]:
        """The spec's entry `base`; empty where nothing says."""
        provenance: Mapping[str, Any] = self.entry.get("provenance", {})
        return provenance.get("spec", {}).get("base") or {}

    @property
    def cached(self) -> bool:
        """Whether it continues texts with a cache of keys and values."""
        return self.format == "genai" or (self.format == "onnx" and read_signature(self.path) is not None)

    @property
    def bytes(self) -> int:
        """The size of its files."""
        if self.path.is_dir():
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        data = self.path.with_name(f"{self.path.name}.data")
        return sum(file.stat().st_size for file in (self.path, data) if file.is_file())

    def inputs(self) -> tuple[InputSpec, ...]:
        """What it takes, with the bounds of integers where its manifest has them."""
        reference: Mapping[str, Any] = self.entry.get("reference", {})
        specs = [InputSpec.from_json(spec) for spec in reference.get("inputs", ())]
        if self.format != "onnx":
            return tuple(spec for spec in specs if spec.name != LABELS)
        stated = {spec.name: spec for spec in specs}
        return tuple(stated.get(spec.name, spec) for spec in read_inputs(self.path))

    def open(self, threads: int = 0) -> Callable[[Tensors], dict[str, torch.Tensor]]:
        """Load it.

        Args:
            threads: how many compute in ONNX Runtime, 0 for all cores; torch has a setting of its own.

        Returns:
            A function from named tensors to the outputs by name.

        Raises:
            AdaptcError: it cannot be loaded.
        """
        if self.format == "onnx":
            return _named(session_call(open_session(self.path, threads=threads)), read_outputs(self.path))
        if self.format == "torch":
            module: Any = load_torch(self.path)
            outputs: Sequence[str] = self.entry["module"]["outputs"]
            return _named(
                module_call(module), [name for name in outputs if name != "loss"], skip_loss=outputs
            )
        return called(self.checkpoint())

    def checkpoint(self) -> nn.Module:
        """The model that transformers loads from its directory.

        Raises:
            AdaptcError: it is no Hugging Face checkpoint, or cannot be loaded.
        """
        from adaptc.emit.huggingface import load_checkpoint
        from adaptc.tracing.huggingface.model import read_pretrained

        if self.format != "hf":
            raise AdaptcError(f"{self.path}: {self.format}, and no Hugging Face checkpoint")
        stored = read_pretrained(str(self.path), self.base["task"], self.base["trust_remote_code"], {})
        return load_checkpoint(stored, self.path)


def _named(
    call: Callable[[Tensors], Sequence[torch.Tensor]], names: Sequence[str], skip_loss: Sequence[str] = ()
) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """A function whose outputs have names; `skip_loss` are the names with that of the loss, which labels give alone."""

    def run(tensors: Tensors) -> dict[str, torch.Tensor]:
        values = call(tensors)
        return dict(zip(names if len(values) == len(names) else skip_loss, values, strict=True))

    return run


def called(model: nn.Module) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """A function of named tensors to the outputs of a model of transformers by name, in evaluation mode."""
    model.eval()

    def run(tensors: Tensors) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            result: Any = model(**tensors)
        named = isinstance(result, Mapping)
        items = cast("Iterable[tuple[Any, Any]]", cast("Any", result).items() if named else enumerate(result))
        return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}

    return run


def product_at(path: Path) -> Product:
    """The one product at a path.

    Raises:
        SpecError: there is none, or there are several.
    """
    products = products_at(path)
    if len(products) > 1:
        names = ", ".join(product.name for product in products)
        raise SpecError([Problem(f"it holds several products: {names}", file=str(path), notes=("name one",))])
    return products[0]


def products_at(path: Path) -> list[Product]:
    """The products at a path that run: of a folder those in it, and in the folders below it.

    Raises:
        SpecError: there is none.
    """
    if not path.exists():
        raise SpecError([Problem("no such path", file=str(path), notes=(ADVICE,))])
    if path.is_file():
        entries = listed(path) or from_metadata(path)
        if entries is None and path.suffix != ".onnx":
            raise SpecError([Problem("no product that runs", file=str(path), notes=(ADVICE,))])
        entry: Mapping[str, Any] = next(iter((entries or {path.name: {}}).values()))
        return [_product(path.name, path, {"format": "onnx", **entry})]
    products = list(_below(path, path))
    if not products:
        raise SpecError([Problem("no product that runs there", file=str(path), notes=(ADVICE,))])
    return products


def _below(root: Path, folder: Path) -> Iterator[Product]:
    """The products of a folder, then those of the folders below it."""
    for name, entry in (listed(folder) or {}).items():
        path = folder / name if entry["format"] == "onnx" else folder
        if entry["format"] in (*RUNNABLE, "genai"):
            yield _product(str(path.relative_to(root)), path, entry)
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith("."):
            yield from _below(root, below)


def _product(name: str, path: Path, entry: Mapping[str, Any]) -> Product:
    form = entry["format"]
    adapters = entry.get("adapters") or {"torch": "live", "hf": "folded", "genai": "folded"}.get(form, "")
    return Product(name if name != "." else path.name, path, form, adapters, "quantization" in entry, entry)
