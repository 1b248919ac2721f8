"""Lines of the model's author: which files are theirs, and how messages show a line."""

from __future__ import annotations

import inspect
import linecache
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn

LIBRARIES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent.parent),
    str(Path(sysconfig.get_path("stdlib"))),
)
"""The folders of torch, adaptc and the standard library: their lines are not the model author's."""
INSTALLED = "site-packages"
"""The folder of other libraries; it may lie inside the standard library's."""


def source_line(path: str, line: int) -> str:
    """A line of source as messages show it: `path:line    text`."""
    return f"{path}:{line}    {linecache.getline(path, line).strip()}".rstrip()


def is_model_code(path: str) -> bool:
    """Whether a file belongs to the model's author or to a library, not to torch, adaptc or Python."""
    torch_home, adaptc_home, standard_library = LIBRARIES
    if path.startswith(("<", torch_home, adaptc_home)):
        return False
    return INSTALLED in path or not path.startswith(standard_library)


def lines_with(model: nn.Module, pattern: str) -> list[tuple[str, int]]:
    """File and line of what fits a pattern in the classes of a model's parts, for an error that names no line."""
    lines: list[tuple[str, int]] = []
    for cls in dict.fromkeys(type(part) for part in model.modules()):
        try:
            path, (text, start) = inspect.getfile(cls), inspect.getsourcelines(cls)
        except (OSError, TypeError):  # defined where no file is, as in a console
            continue
        if is_model_code(path):
            lines += [(path, start + at) for at, line in enumerate(text) if re.search(pattern, line)]
    return lines
