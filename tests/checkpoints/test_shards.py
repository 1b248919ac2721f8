"""Safetensors files written a tensor at a time are what safetensors itself writes and reads."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptc.checkpoints.shards import INDEX, check_safetensors, write_safetensors, write_shards
from adaptc.errors import ProofError, WeightError
from adaptc.weights import SAFETENSORS_DTYPES, Deferred, Held, Weight


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, sizes that leave no alignment to chance, and shapes at the edges."""
    torch.manual_seed(0)
    found = {}
    for code, dtype in SAFETENSORS_DTYPES.items():
        for shape in ((3,), (2, 5), (), (0, 4), (1, 1, 7)):
            value = torch.randn(shape) * 10
            found[f"{code}.{'x'.join(map(str, shape))}"] = value.abs().to(dtype)
    found["ü.transposed"] = torch.randn(4, 3).T
    return found


def test_it_is_what_safetensors_reads(tmp_path: Path) -> None:
    given = tensors()
    digests = write_safetensors(tmp_path / "a", {name: Held(value) for name, value in given.items()})
    check_safetensors(tmp_path / "a", digests)
    got = load_file(tmp_path / "a")
    assert set(got) == set(given)
    for name, value in given.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name
    with open(tmp_path / "a", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length % 8 == 0
        header = json.loads(file.read(length))
    assert header["__metadata__"] == {"format": "pt"}
    for name, value in given.items():
        assert header[name]["data_offsets"][0] % value.element_size() == 0, f"{name} is not aligned"


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert not [one for one in alive if one() is not None], "another tensor is still there"
        value = torch.randn(64, 16)
        alive.append(weakref.ref(value))
        return value

    weights: dict[str, Weight] = {f"w{i}": Deferred((64, 16), torch.float32, make) for i in range(6)}
    write_shards(tmp_path, weights, "9KB", 0)
    assert len(alive) == 6
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_shards_and_their_index(tmp_path: Path) -> None:
    """A tensor larger than the limit has a file of its own; one file needs no index."""
    weights: dict[str, Weight] = {
        f"w{i}": Held(torch.full((n,), float(i))) for i, n in enumerate((100, 100, 900, 50))
    }
    write_shards(tmp_path, weights, "1KB", 1150)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 1150, "total_size": 4600}
    assert set(index["weight_map"]) == set(weights)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name].load())
    names = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert set(index["weight_map"].values()) == {p.name for p in tmp_path.glob("*.safetensors")} == names
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", weights, "1MB", 1150)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("at", [0, 8, 200, -1])
def test_a_changed_byte_is_found(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a"
    digests = write_safetensors(path, {"a": Held(torch.randn(64)), "b": Held(torch.ones(3))})
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProofError):
        check_safetensors(path, digests)


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    digests = write_safetensors(path, {"a": Held(torch.randn(64))})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ProofError, match="not a whole safetensors file"):
        check_safetensors(path, digests)


def test_a_weight_that_is_not_what_it_says(tmp_path: Path) -> None:
    wrong = Deferred((4, 4), torch.float32, lambda: torch.randn(4, 5))
    with pytest.raises(
        WeightError, match=r"w is torch\.float32 \[4, 4\], but was loaded as torch.float32 \[4, 5\]"
    ):
        write_safetensors(tmp_path / "a", {"w": wrong})


def test_a_dtype_that_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"w is torch\.complex64; expected one of torch\.float64"):
        write_safetensors(tmp_path / "a", {"w": Held(torch.randn(2, dtype=torch.complex64))})
