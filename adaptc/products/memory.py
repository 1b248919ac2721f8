"""How much memory a product takes, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from adaptc.errors import AdaptcError


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def growth_of(path: Path, name: str, sizes: dict[str, int]) -> int:
    """By how many bytes a process grows that loads a product and calls it once.

    Args:
        path: where the product is among others.
        name: its name there.
        sizes: of the named dimensions of its inputs.

    Raises:
        AdaptcError: it does not run.
    """
    command = [sys.executable, "-m", __name__, str(path), name, json.dumps(sizes)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise AdaptcError(f"{name}: its memory cannot be measured: {reason}")
    return int(ran.stdout.splitlines()[-1])


def main() -> None:
    """Load the product that the command line names, call it once, and write by how much this process has grown."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    import torch

    from adaptc.ir.example_inputs import example_tensors
    from adaptc.products.product import products_at

    torch.set_num_threads(1)
    path, name, sizes = sys.argv[1:]
    (product,) = (product for product in products_at(Path(path)) if product.name == name)
    before = peak_memory()
    assert onnxruntime  # its code is no part of a product
    product.open(threads=1)(example_tensors(product.inputs(), json.loads(sizes)))
    sys.stdout.write(f"{max(0, peak_memory() - before)}\n")


if __name__ == "__main__":
    main()
