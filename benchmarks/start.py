"""How long it takes until something happens: importing adaptc, and `adaptc --help`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 7


def start() -> None:
    """Print both, as the median of fresh processes, beside what an empty interpreter takes."""
    print("\n| start, a fresh process | time |\n|---|---|")
    for what, arguments in (
        ("an empty interpreter", ["-c", "pass"]),
        ("import adaptc", ["-c", "import adaptc"]),
        ("adaptc --help", ["-m", "adaptc.cli.app", "--help"]),
    ):
        taken = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            taken.append(time.perf_counter() - began)
        print(f"| {what} | {statistics.median(taken):.3f} s |", flush=True)
