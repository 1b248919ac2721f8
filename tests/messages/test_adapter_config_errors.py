"""A value in `adapter_config.json` that cannot be is placed, and what nobody knows there has a way to go on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc.checkpoints.adapter import read
from adaptc.checkpoints.peft_config import declared
from adaptc.errors import WeightError
from tests.messages.test_adapter_errors import PLACE, SPEC

UNKNOWN = "lorap_emb_lr"


@pytest.fixture
def refused(adapter: Path) -> Callable[[], str]:
    """Read the adapter's configuration, expect a refusal, and give its words."""

    def check() -> str:
        with pytest.raises(WeightError) as caught:
            declared(read(adapter))
        return str(caught.value)

    return check


@pytest.fixture
def planned(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Plan a spec with the adapter; the exit code, and what is said of the entry."""

    def check(**entry: Any) -> tuple[int, str]:
        extra = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in entry.items())
        text = SPEC.replace("WIDTH", "16").replace("SEED", "0").replace("emit:", f"{extra}emit:")
        result = cli("plan", write(text))
        assert "Traceback" not in result.err, result.err
        return result.code, result.err

    return check


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r": "eight"}, "expected a whole number, got 'eight'"),
    ({"r": "8"}, "expected a whole number, got '8'"),
    ({"r": True}, "expected a whole number, got true"),
    ({"r": 0}, "must be greater than 0, got 0"),
    ({"r": -4}, "must be greater than 0, got -4"),
    ({"r": None}, "expected a whole number, got nothing"),
    ({"r": 8.5}, "expected a whole number, got 8.5"),
    ({"lora_alpha": "loud"}, "expected a number, got 'loud'"),
    ({"lora_alpha": None}, "expected a number, got nothing"),
    ({"lora_alpha": -1}, "must be greater than 0, got -1"),
    ({"lora_dropout": 1.5}, "must be less than 1, got 1.5"),
    ({"use_rslora": "yes"}, "expected true or false, got 'yes'"),
    ({"use_dora": "yes"}, "expected true or false, got 'yes'"),
    ({"bias": "some"}, "expected 'none', 'all' or 'lora_only', got 'some'"),
    ({"rank_pattern": [8]}, "expected a mapping, got a list"),
    ({"target_modules": 3}, "expected text or a list of names, got 3"),
    ({"target_modules": {"query": 1}}, 'expected text or a list of names, got {"query": 1}'),
    ({"target_modules": ["query", 3]}, 'expected text or a list of names, got ["query", 3]'),
    ({"target_modules": "(query"}, "is not a regular expression"),
    ({"target_modules": None}, "names no target_modules"),
    ({"exclude_modules": 3}, "expected text or a list of names, got 3"),
    ({"modules_to_save": 4}, "expected a list of names, got 4"),
    ({"modules_to_save": [0]}, "expected a list of names, got [0]"),
    ({"modules_to_save": "head"}, 'expected a list of names, got "head"'),
    ({"modules_to_save": {"head": 1}}, 'expected a list of names, got {"head": 1}'),
    ({"target_parameters": "W"}, 'expected a list of names, got "W"'),
    ({"layers_to_transform": "first"}, 'expected layer numbers: one, or a list of them, got "first"'),
    ({"layers_to_transform": [0.5]}, "expected layer numbers: one, or a list of them, got [0.5]"),
    ({"layers_pattern": 7}, "expected text or a list of names, got 7"),
    ({"layers_pattern": "layers"}, "has no meaning without layers_to_transform"),
    ({"fan_in_fan_out": "no"}, "expected true or false, got 'no'"),
    ({"peft_type": 5}, "expected text, got 5"),
    ({"task_type": ["CAUSAL_LM"]}, "expected text, got a list"),
    ({"base_model_name_or_path": {}}, "expected text, got a mapping"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=lambda value: json.dumps(value))
def test_a_value_that_cannot_be_is_placed(
    refused: Callable[[], str],
    configure: Callable[..., None],
    adapter: Path,
    values: dict[str, Any],
    words: str,
) -> None:
    configure(**values)
    text, (key,) = refused(), values
    lines = (adapter / "adapter_config.json").read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if line.startswith(f'  "{key}"'))
    column = len(f'  "{key}": ') + 1
    assert f"{adapter}/adapter_config.json:{number}:{column}: {key}: " in text
    assert words in text


def test_the_line_of_the_spec_is_told_too(
    planned: Callable[..., tuple[int, str]], configure: Callable[..., None]
) -> None:
    configure(r="eight")
    code, text = planned()
    assert code == 1
    assert re.search(
        rf"{PLACE}.*/adapter/adapter_config\.json:\d+:8: r: expected a whole number, got 'eight'", text
    )


def test_a_value_deep_inside_is_placed(refused: Callable[[], str], configure: Callable[..., None]) -> None:
    configure(rank_pattern={"value": 2, "query": 0})
    assert re.search(
        r"adapter_config\.json:\d+:14: rank_pattern\.query: must be greater than 0, got 0", refused()
    )


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_is_no_regular_expression(
    refused: Callable[[], str], configure: Callable[..., None], key: str
) -> None:
    configure(**{key: {"query": 2, "(": 3}})
    assert f"{key}.(: '(' is not a regular expression: missing )" in refused()


def test_everything_wrong_is_told(refused: Callable[[], str], configure: Callable[..., None]) -> None:
    configure(r="eight", lora_alpha=None)
    text = refused()
    assert ": r: expected a whole number" in text
    assert ": lora_alpha: expected a number" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"r": NaN}', "not JSON (it has no number NaN)"),
        (b'{"r": 1e999}', "not JSON (1e999 is larger than any number)"),
        (b'{"r": ' + b"1" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b"[" * 100_000, "not JSON (nested too deeply)"),
        (b"\xff\xfe{", "not JSON ('utf-8' codec"),
        (b'["LORA"]', "expected a JSON object, got list"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_file_that_is_no_json_object(
    refused: Callable[[], str], adapter: Path, text: bytes, words: str
) -> None:
    (adapter / "adapter_config.json").write_bytes(text)
    assert f"{adapter}/adapter_config.json: {words}" in refused()


# options that would change the result


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("use_bdlora", True),
        ("enable_lora", [True, False, True]),
    ],
)
def test_an_option_that_changes_the_result(
    refused: Callable[[], str], configure: Callable[..., None], option: str, value: object
) -> None:
    configure(**{option: value})
    text = refused()
    assert (
        f": {option}: {json.dumps(value)} changes what lora computes, and this adaptc does not read it"
        in text
    )
    assert f"write in its entry: ignore: [{option}]" in text


@pytest.mark.parametrize("value", [0.5, False, 0, "", "none", [0], {"a": 1}])
def test_an_option_that_nobody_knows(
    refused: Callable[[], str], configure: Callable[..., None], value: object
) -> None:
    """False may be no default: it is not passed over."""
    configure(**{UNKNOWN: value})
    text = refused()
    assert re.search(rf"adapter_config\.json:\d+:3: {UNKNOWN}: unknown option '{UNKNOWN}'\n", text)
    assert f"write in its entry: ignore: [{UNKNOWN}]" in text


def test_a_misspelt_option(refused: Callable[[], str], configure: Callable[..., None]) -> None:
    configure(lora_alhpa=3)
    assert "unknown option 'lora_alhpa'; did you mean 'lora_alpha'?" in refused()


@pytest.mark.parametrize("value", [None, [], {}])
def test_an_option_that_says_nothing(adapter: Path, configure: Callable[..., None], value: object) -> None:
    configure(**{UNKNOWN: value})
    assert declared(read(adapter)).method.name == "lora"


def test_a_later_peft_says_what_its_options_default_to(
    adapter: Path,
    refused: Callable[[], str],
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option at its default says what a configuration without the option says."""
    peft = pytest.importorskip("peft")
    from dataclasses import make_dataclass

    later = make_dataclass("Later", [("of_2031", bool, True)], bases=(peft.LoraConfig,))
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA", later)
    configure(of_2031=True)
    assert declared(read(adapter)).method.name == "lora"
    configure(of_2031=False)
    assert "unknown option 'of_2031'" in refused()


# the way to go on


@pytest.fixture
def entry(adapter: Path) -> Callable[..., dict[str, Any]]:
    """A spec that ignores options of the adapter."""

    def make(*ignored: str) -> dict[str, Any]:
        return {
            "base": {"python": "message_models:build", "args": {"width": 16, "seed": 0}},
            "inputs": {"x": "float32[batch, 16]"},
            "adapt": [{"adapter": str(adapter), "ignore": list(ignored)}],
        }

    return make


def test_an_ignored_option_is_told(
    configure: Callable[..., None], entry: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configure(**{UNKNOWN: 1e-6, "use_qalora": True})
    compiled = adaptc.compile(entry(UNKNOWN, "use_qalora"))
    assert f"adapt.0: read without the option {UNKNOWN} of its configuration" in compiled.plan.notes
    compiled.emit("onnx", tmp_path / "m.onnx")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["adapters"][0]["ignored"] == {UNKNOWN: 1e-6, "use_qalora": True}


def test_an_option_to_ignore_that_is_read(
    planned: Callable[..., tuple[int, str]], configure: Callable[..., None]
) -> None:
    configure(use_rslora=True)
    code, text = planned(ignore=["use_rslora"])
    assert code == 1
    assert "lora reads 'use_rslora'; `ignore` is for options that adaptc does not read" in text


def test_an_option_to_ignore_that_is_not_there(
    planned: Callable[..., tuple[int, str]], configure: Callable[..., None]
) -> None:
    configure(**{UNKNOWN: 1e-6})
    code, text = planned(ignore=["lorap_emb"])
    assert code == 2
    assert "spec.yaml:6:13: adapt.0.ignore: unknown option 'lorap_emb'; did you mean 'lorap_emb_lr'?" in text


def test_a_checkpoint_loaded_later_is_read_without_the_option_too(
    configure: Callable[..., None], entry: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    compiled = adaptc.compile(entry())
    configure(**{UNKNOWN: 1e-6})
    with pytest.raises(WeightError, match="unknown option"):
        compiled.load_adapter(adapter)
    compiled.load_adapter(adapter, ignore=[UNKNOWN])
    shutil.copytree(adapter, tmp_path / "other")
    adaptc.load_adapter(compiled.module, tmp_path / "other", ignore=[UNKNOWN])
