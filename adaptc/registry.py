"""Finds methods and passes: those shipped under `adaptc.passes`, and those of installed packages."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from adaptc.errors import AdaptcError
from adaptc.method import METHODS, Method
from adaptc.scheme import SCHEMES, Scheme

if TYPE_CHECKING:
    from adaptc.packed import Reader
    from adaptc.pipeline import Pass

ENTRY_POINT_GROUP = "adaptc.passes"


def _import_all(package_name: str) -> None:
    package = importlib.import_module(package_name)
    for found in pkgutil.iter_modules(package.__path__, package_name + "."):
        importlib.import_module(found.name)


@cache
def load_methods() -> dict[str, type[Method]]:
    """Every method, shipped or of an installed package. The shipped ones do not import torch."""
    _import_all("adaptc.passes.insert")
    _load_installed()
    return METHODS


@cache
def load_schemes() -> dict[str, type[Scheme]]:
    """Every quantization scheme, shipped or of an installed package. The shipped ones do not import torch."""
    _import_all("adaptc.passes.quantize")
    _load_installed()
    return SCHEMES


@cache
def load_readers() -> dict[str, Reader]:
    """Every reader of checkpoints that another library has quantized, by their `quant_method`. Imports torch."""
    from adaptc.packed import READERS

    _import_all("adaptc.passes.stored")
    _load_installed()
    return READERS


@cache
def _load_installed() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            package = entry_point.dist.name if entry_point.dist else "an installed package"
            raise AdaptcError(
                f"{package} (entry point {entry_point.name} = {entry_point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}\n  mend that package, or uninstall it"
            ) from error


def method_named(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        KeyError: nothing of that name is registered.
    """
    load_methods()
    return METHODS[name]


@cache
def load_passes() -> dict[str, type[Pass]]:
    """Every pass, one `insert-` pass for every method, one `quantize-` pass for every scheme. Imports torch."""
    from adaptc.insert_passes import insert_pass
    from adaptc.pipeline import PASSES
    from adaptc.quantize import quantize_pass

    for package in ("factor", "fold", "lower"):
        _import_all(f"adaptc.passes.{package}")
    inserts = {f"insert-{name}": insert_pass(cls) for name, cls in load_methods().items()}
    quantizes = {f"quantize-{name}": quantize_pass(cls) for name, cls in load_schemes().items()}
    return {**PASSES, **inserts, **quantizes}
