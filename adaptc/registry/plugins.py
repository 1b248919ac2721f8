"""Plugins: modules and files of a person's own with methods, schemes and passes, imported because they are named."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from threading import RLock
from typing import Any

from adaptc.errors import AdaptcError, DefinitionError

_LOCK = RLock()
_LOADED: dict[Path, int] = {}
"""The files that were run -> when each was changed last, in nanoseconds."""


def load_plugin(name: str, folder: Path) -> None:
    """Import a module, or run a file once until it is changed. What it registers is known from then on.

    Args:
        name: a module such as `ssf`, or a file such as `./my_passes.py`.
        folder: where a relative path starts.

    Raises:
        AdaptcError: there is no such module or file, or it fails; names its line.
    """
    with _LOCK:
        if name.endswith(".py") or "/" in name:
            _run(folder / Path(name).expanduser())
        else:
            _import(name, folder)


def _import(name: str, folder: Path) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise _failed(name, error) from error
        beside = folder / f"{name}.py"
        advice = f"install it; a file is named by its path, such as ./{name}.py"
        if beside.is_file():
            advice = f"{beside} is a file: write ./{name}.py"
        raise AdaptcError(f"there is no module {name!r}", advice) from error
    except DefinitionError:
        raise
    except Exception as error:
        raise _failed(name, error) from error


def _run(path: Path) -> None:
    if not path.is_file():
        raise AdaptcError(f"{path}: no such file", "a relative path starts at the spec's folder")
    path = path.resolve()
    changed = path.stat().st_mtime_ns
    if _LOADED.get(path) == changed:
        return
    name = f"adaptc_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AdaptcError(f"{path}: not a file of Python", "a plugin is a module or a .py file")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except DefinitionError:
        raise
    except Exception as error:
        raise _failed(str(path), error) from error
    _LOADED[path] = changed


def _failed(name: str, error: Exception) -> AdaptcError:
    """The error of a plugin that fails, with the last line of its own that ran."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return AdaptcError(
        f"plugin {name} cannot be loaded: {type(error).__name__}: {error}",
        f"at {frame.filename}:{frame.lineno}    {frame.line}",
    )
