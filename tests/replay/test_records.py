"""What records are made of: that they keep what they are given, and that a change shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.replay import sections
from tests.replay.tensors import tensors_differ, tensors_text

LINES = [f"row{index} = {index}" for index in range(40)]
CHANGED = ["new", *LINES[:10], "other", *LINES[12:30], *LINES[31:], "", "last"]


def test_texts_are_read_as_they_were_written(tmp_path: Path) -> None:
    base = {"first": "\n".join(LINES), "empty": ""}
    texts = {
        "same": base["first"],
        "changed": "\n".join(CHANGED),
        "empty": "",
        "back": base["first"],
        "own": "x",
    }
    sections.write(tmp_path / "base.txt", base)
    sections.write(tmp_path / "texts.txt", texts, tmp_path / "base.txt")
    assert sections.read(tmp_path / "base.txt") == base
    assert sections.read(tmp_path / "texts.txt") == texts
    assert len((tmp_path / "texts.txt").read_text()) < len(base["first"])


def test_a_diff_fits_no_other_text(tmp_path: Path) -> None:
    sections.write(tmp_path / "base.txt", {"first": "\n".join(LINES)})
    sections.write(tmp_path / "texts.txt", {"changed": "\n".join(CHANGED)}, tmp_path / "base.txt")
    sections.write(tmp_path / "base.txt", {"first": "\n".join(LINES[3:])})
    with pytest.raises(ValueError, match="the diff expects 'row10' where the text has 'row13 = 13'"):
        sections.read(tmp_path / "texts.txt")


def test_a_difference_is_shown() -> None:
    said = sections.difference({"a": "1\n2", "b": "3"}, {"a": "1\n4", "c": ""}, ["a", "b", "c"])
    for words in ("--- a, recorded", "-2", "+4", "b is only in the record", "c is not in the record"):
        assert words in said.splitlines()
    assert not sections.difference({"a": "1"}, {"a": "1"}, ["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounding_changes_the_hash_only(dtype: torch.dtype) -> None:
    tensor = torch.rand(30, 20).to(dtype)
    other = tensor.clone()
    other.view(torch.uint8)[0, 0] ^= 1  # the last bit of the first number
    assert tensors_text({"w": tensor}) != tensors_text({"w": other})
    assert not tensors_differ(tensors_text({"w": tensor}), tensors_text({"w": other}))


def test_a_change_beyond_rounding_is_seen() -> None:
    tensor = torch.rand(30, 20)
    recorded = tensors_text({"w": tensor})
    for other in (tensor * 1.001, tensor.flip(0), tensor + 0.001, tensor.double(), tensor.reshape(20, 30)):
        assert tensors_differ(recorded, tensors_text({"w": other}))
    assert tensors_differ(recorded, tensors_text({"w": tensor, "v": tensor}))
    codes = torch.randint(0, 255, (64, 32), dtype=torch.uint8)
    few = codes.clone()
    few[0, 0] ^= 1
    assert not tensors_differ(tensors_text({"c": codes}), tensors_text({"c": few}))
    assert tensors_differ(tensors_text({"c": codes}), tensors_text({"c": codes.roll(1, 0)}))
