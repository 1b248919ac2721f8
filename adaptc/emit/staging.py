"""Atomic writes: an output is written and proved beside its final path, and renamed to it at the end."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from adaptc.errors import AdaptcError

OLD = "old"
"""The name in the staging folder of an output that is being replaced."""

_LIVE: set[Path] = set()
"""The staging folders of this process."""
_OPEN: list[Staging] = []
"""The contexts that have not been left."""


@contextmanager
def uninterrupted() -> Generator[None]:
    """Hold Ctrl-C back until the block has ended. Python hands it to the main thread alone, so others need not wait."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held_back: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: held_back.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held_back:
            signal.raise_signal(signal.SIGINT)


def discard_all() -> None:
    """Remove all that is staged and not yet in place, for a process that is about to end."""
    for staging in _OPEN:
        staging.discard()


class Staging:
    """A context in which outputs are staged. Leaving it without an error puts all of them in place, or none.

    After an error, or a kill, the old outputs are intact: the next run that writes to the same path puts back what a
    killed run had moved away, and removes what it left.

    Args:
        wrote: called with the bytes written of an output, and of how many; for whoever writes to report to.
    """

    def __init__(self, wrote: Callable[[int, int], None] | None = None) -> None:
        self.wrote = wrote
        self._staged: list[tuple[Path, Path]] = []
        self._new_folders: list[Path] = []

    def __enter__(self) -> Self:
        _OPEN.append(self)
        return self

    def path(self, final: Path) -> Path:
        """A path on the same file system where what will become `final` is written; the same path when asked again.

        Raises:
            AdaptcError: its folder cannot be written to.
        """
        staged = self.staged(final)
        if staged is not None:
            return staged
        try:
            with uninterrupted():
                self._make_parents(final.parent)
                _sweep(final)
                prefix = f".{final.name}.adaptc-{os.getpid()}-"
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
                _LIVE.add(folder)
                self._staged.append((folder / final.name, final))
        except OSError as error:
            raise AdaptcError(f"cannot write to {final.parent}: {error.strerror or error}") from error
        return folder / final.name

    def staged(self, final: Path) -> Path | None:
        """The path of an output of this run that will become `final`, if there is one."""
        return next((staged for staged, other in self._staged if other == final), None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with uninterrupted():
                    self._put_in_place()
            elif isinstance(error, OSError):
                raise AdaptcError(
                    f"cannot write: {error.strerror or error}; every earlier output is unchanged"
                ) from error
        finally:
            self.discard()
            _OPEN.remove(self)

    def discard(self) -> None:
        """Remove what is still staged, and the folders made for it that are empty."""
        for staged, _ in self._staged:
            shutil.rmtree(staged.parent, ignore_errors=True)
            _LIVE.discard(staged.parent)
        for folder in reversed(self._new_folders):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _make_parents(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._new_folders += reversed(missing)

    def _put_in_place(self) -> None:
        done: list[tuple[Path, Path]] = []
        try:
            for staged, final in self._staged:
                done.append((staged, final))
                _replace(staged, final)
        except BaseException as error:
            for staged, final in reversed(done):
                _put_back(staged, final)
            if not isinstance(error, OSError):
                raise
            raise AdaptcError(
                f"cannot write {done[-1][1]}: {error.strerror or error}; every earlier output is unchanged"
            ) from error


def _replace(staged: Path, final: Path) -> None:
    """Put a new output in place, and keep the old one in the staging folder until all are in place."""
    old = staged.parent / OLD
    if final.is_file() and staged.is_file():
        try:
            os.link(final, old)  # the rename below is then atomic, and the old file still has a name
        except OSError:
            shutil.copy2(final, old)
    elif final.exists():
        os.replace(final, old)
    os.replace(staged, final)


def _put_back(staged: Path, final: Path) -> None:
    """Take a new output out of its place again, and put the old one back."""
    old = staged.parent / OLD
    if not staged.exists() and final.exists():
        os.replace(final, staged)
    if old.exists() and not final.exists():
        os.replace(old, final)


def _sweep(final: Path) -> None:
    """Remove the staging folders of killed runs; put back an old output that one had moved away."""
    for folder in final.parent.glob(f".{glob.escape(final.name)}.adaptc-*"):
        owner = folder.name.rpartition(".adaptc-")[2].partition("-")[0]
        if folder in _LIVE or (owner.isdecimal() and _alive(int(owner))):
            continue
        if (folder / OLD).exists() and not final.exists():
            os.replace(folder / OLD, final)
        shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process runs under this number; our own number is an earlier run's, since `_LIVE` lists ours."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
