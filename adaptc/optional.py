"""Packages that adaptc can do without: imported where they are needed, and named where they are missing."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adaptc.errors import AdaptcError

EXTRAS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "tokenizers": "hf",
    "bitsandbytes": "quant",
    "onnxruntime_genai": "serve",
}
"""A package -> the extra of adaptc that installs it."""


class MissingPackageError(AdaptcError):
    """A package that is needed is not installed, or cannot be imported as it is."""


def optional(module: str) -> Any:
    """Import a module of a package that is not installed with adaptc itself.

    Args:
        module: its full name, such as `transformers.conversion_mapping`.

    Raises:
        MissingPackageError: it is not installed, the installed version has no such module, or it fails on import.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        wanted = f"adaptc[{EXTRAS[package]}]" if package in EXTRAS else package
        if error.name == package:
            raise MissingPackageError(
                f"this needs {package}, which is not installed", f"pip install '{wanted}'"
            ) from error
        raise MissingPackageError(
            f"this needs {module}, and {package} {_version(package)} as it is installed cannot give it: {error}",
            f"pip install --upgrade '{wanted}'",
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of an unknown version)"
