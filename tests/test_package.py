"""The sdist, and the wheel made of it, are whole; `tests/test_optional.py` installs a wheel alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKE = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
pytestmark = pytest.mark.slow


def make(kind: str, source: Path, out: Path) -> Path:
    """The file that setuptools builds of a folder: an `sdist` or a `wheel`."""
    command = [sys.executable, "-c", MAKE, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "adaptc"
    leave_out = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "all-MiniLM-L6-v2"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave_out)
    return make("sdist", copy, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return make("wheel", source, folder)


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "adaptc").rglob("*.py") if "passes" not in p.parts}
    modules |= {f"adaptc/{p.relative_to(ROOT)}" for p in (ROOT / "passes").rglob("*.py")}
    assert not modules - names
    assert "adaptc/py.typed" in names
    assert not {name for name in names if name.startswith(("tests/", "docs/", "passes/"))}


def test_the_metadata_is_that_of_the_project(wheel: Path) -> None:
    (name,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")]
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    assert metadata["Version"] == PROJECT["version"]
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert PROJECT["version"] in (ROOT / "CITATION.cff").read_text()
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
