"""`python -m benchmarks [PART ...]` prints the tables; all parts but the largest, if none is named."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.decoding import decoding, decoding_half_billion
from benchmarks.large import half_billion, seven_billion
from benchmarks.minilm import minilm
from benchmarks.perplexity import perplexity
from benchmarks.probing import probing
from benchmarks.qlora import qlora
from benchmarks.quantized import half_billion_in_bits, orders
from benchmarks.rows import rows
from benchmarks.runtime import runtime
from benchmarks.start import start
from benchmarks.steps import steps
from benchmarks.swap import swap

PARTS = {
    "start": start,
    "minilm": minilm,
    "steps": steps,
    "runtime": runtime,
    "qlora": qlora,
    "orders": orders,
    "swap": swap,
    "decoding": decoding,
    "decoding-half-billion": decoding_half_billion,
    "perplexity": perplexity,
    "probing": probing,
    "rows": rows,
    "half-billion": half_billion,
    "half-billion-in-bits": half_billion_in_bits,
    "seven-billion": seven_billion,
}
PACKAGES = ("torch", "transformers", "peft", "onnxruntime")


def machine() -> str:
    """What this ran on, and with which versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine()
    )
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{os.cpu_count()} CPUs of {name}, {memory:.0f} GB, Python {platform.python_version()}, {packages}, "
        f"{date.today().isoformat()}"
    )


def main() -> None:
    """Run the parts that are named."""
    names = sys.argv[1:] or ["start", "minilm", "steps", "half-billion"]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    print(
        f"# Results\n\n`python -m benchmarks {' '.join(names)}` on {machine()}.\n"
        "A ratio below 1 is in adaptc's favour.\n"
    )
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
