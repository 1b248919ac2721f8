"""Open a saved `torch.export` program without running any code that it holds."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from adaptc.errors import WeightError
from adaptc.optional import optional

FILES = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.format_version|\.data/\w+|models/\w+\.json"
    r"|data/(weights|constants)/[\w.]+|data/sample_inputs/\w+\.pt)"
)
"""The files of a program: its graph, raw tensors, and one file of example tensors."""
OPERATORS = {"transformers": "transformers.integrations.moe", "adaptc": "adaptc.quantization.operators"}
"""Namespace of operators that are not torch's -> the module that registers them."""


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Load a program saved by `torch.export.save`.

    `torch.export.load` unpickles any file that the archive marks as a pickle. So every file of the archive is
    checked first: one that could be a pickle is refused, unless it holds tensors only.

    Raises:
        WeightError: the file is broken or truncated, or holds more than a graph and tensors.
    """
    try:
        _check(path)
        _register_operators(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path))
    except WeightError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightError(f"{path}: broken, or not a program saved by torch.export.save ({first})") from error


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not FILES.fullmatch(name):
                raise WeightError(f"{path}: holds {name!r}, which no plain program does; it is refused")
            if name.endswith("_config.json"):
                _check_config(path, name, json.loads(archive.read(name)))
            elif name.endswith(".pt"):
                _check_tensors(path, name, archive.read(name))


def _register_operators(path: Path) -> None:
    """Import the modules of `OPERATORS` that the graph needs; torch names any other operator in its error."""
    with zipfile.ZipFile(path) as archive:
        graphs = [archive.read(n) for n in archive.namelist() if re.search(r"/models/\w+\.json$", n)]
    for namespace, module in OPERATORS.items():
        if any(f'"torch.ops.{namespace}.'.encode() in graph for graph in graphs):
            optional(module)


def _check_config(path: Path, name: str, config: object) -> None:
    if '"use_pickle": true' in json.dumps(config):
        raise WeightError(f"{path}: {name} asks for a pickle, which can run code; it is refused")


def _check_tensors(path: Path, name: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise WeightError(
            f"{path}: {name} holds more than tensors, which can run code; it is refused"
        ) from error
