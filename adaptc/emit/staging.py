"""Atomic writes: everything is written beside its place, proved there, and renamed into it at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from adaptc.errors import AdaptcError


class Staging:
    """A context in which outputs are staged. Leaving it without an error puts all of them in place.

    After an error, or a kill before the renames, the old outputs are whole; staged files are removed, or carry
    a name that starts with a dot and are removed by the next run.
    """

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []

    def __enter__(self) -> Self:
        return self

    def path(self, final: Path) -> Path:
        """A place to write what will become `final`, on the same file system; the same one when asked again.

        Raises:
            AdaptcError: its folder cannot be written to.
        """
        staged = self.staged(final)
        if staged is not None:
            return staged
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _sweep(final)
            folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.adaptc-", dir=final.parent))
        except OSError as error:
            raise AdaptcError(f"cannot write to {final.parent}: {error.strerror or error}") from error
        self._staged.append((folder / final.name, final))
        return folder / final.name

    def staged(self, final: Path) -> Path | None:
        """Where an earlier output of this run waits to become `final`, if one does."""
        return next((staged for staged, other in self._staged if other == final), None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for staged, final in self._staged:
                    _replace(staged, final)
        finally:
            for staged, _ in self._staged:
                shutil.rmtree(staged.parent, ignore_errors=True)


def _replace(staged: Path, final: Path) -> None:
    old = staged.parent / "old"
    if final.exists() and (final.is_dir() or staged.is_dir()):
        os.replace(
            final, old
        )  # a directory cannot be renamed over: the old one is kept until the new is there
        try:
            os.replace(staged, final)
        except OSError:
            os.replace(old, final)
            raise
    else:
        os.replace(staged, final)


def _sweep(final: Path) -> None:
    """Remove what an earlier run that was killed left; put back an old output it had moved away."""
    for folder in final.parent.glob(f".{final.name}.adaptc-*"):
        old = folder / "old"
        if old.exists() and not final.exists():
            os.replace(old, final)
        shutil.rmtree(folder, ignore_errors=True)
