"""The spec and the two commands of docs/serving.md run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.command_line import run
from tests.served import Served

PAGE = Path(__file__).parents[2] / "docs/serving.md"


def block(language: str) -> str:
    """The page's block of code in a language; there is one."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return text


def test_two_commands_from_an_adapter_to_text(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama").symlink_to(served.base)
    (tmp_path / "lora").symlink_to(served.adapter)
    (tmp_path / "spec.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in block("sh").splitlines()]
    assert [command[:2] for command in commands] == [["adaptc", "compile"], ["adaptc", "generate"]]
    compiled, generated = (run(*command[1:]) for command in commands)
    assert compiled.code == 0, compiled.err
    assert "proved  genai, greedy, one by one" in compiled.err
    assert generated.code == 0, generated.err
    assert len(generated.out) > 20
    assert "tokens/s" in generated.err
