"""A checkpoint that does not fit is a clear error at its line of the spec, and costs no earlier output."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptc
from adaptc.errors import SpecError, WeightError

SPEC = """\
base: {python: "message_models:build", args: {width: WIDTH, seed: SEED}}
inputs: {x: "float32[batch, WIDTH]"}
adapt:
  - adapter: ./adapter
emit:
  - {format: peft, path: out/adapter}
"""
PLACE = "spec.yaml:5:14: adapt.0.adapter: "
PREFIX = "base_model.model."
QUERY = f"{PREFIX}layers.0.query.lora_A.weight"


@pytest.fixture
def spec(write: Callable[[str], Path]) -> Callable[..., Path]:
    def make(width: int = 16, seed: int = 0, **entry: Any) -> Path:
        text = SPEC.replace("WIDTH", str(width)).replace("SEED", str(seed))
        extra = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in entry.items())
        return write(text.replace("emit:", f"{extra}emit:"))

    return make


@pytest.fixture(scope="session")
def good(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an earlier compile of the whole adapter wrote."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(trained, folder / "adapter")
    path = folder / "spec.yaml"
    path.write_text("version: 1\n" + SPEC.replace("WIDTH", "16").replace("SEED", "0"))
    adaptc.compile(path).emit("peft", folder / "out/adapter")
    return folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(
    cli: Callable[..., Any], spec: Callable[..., Path], good: Path, tmp_path: Path, adapter: Path
) -> Callable[..., str]:
    """Compile, expect a refusal at the adapter's line, and give its words."""

    def check(code: int = 1, command: str = "compile", **entry: Any) -> str:
        path = spec(**entry)
        before = contents(Path(shutil.copytree(good, tmp_path / "out")))
        assert before
        result = cli(command, path)
        shown = f"exit code {result.code}\n{result.out}\n{result.err}"
        assert "Traceback" not in result.err, shown
        assert result.code == code, shown
        assert contents(tmp_path / "out") == before, "the earlier output changed"
        assert sorted(p.name for p in tmp_path.iterdir()) in (
            ["adapter", "out", "spec.yaml"], ["out", "spec.yaml"],
        )  # fmt: skip
        assert f"{tmp_path}/{PLACE}" in result.err, shown
        return result.err

    return check


@pytest.fixture
def tensors(adapter: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], Any]], None]:
    """Change the adapter's tensors."""

    def change(how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        file = adapter / "adapter_model.safetensors"
        values = load_file(file)
        how(values)
        save_file(values, file)

    return change


def test_the_whole_adapter_compiles(
    cli: Callable[..., Any], spec: Callable[..., Path], adapter: Path
) -> None:
    path = spec()
    result = cli("compile", path)
    assert result.code == 0, result.err
    again = load_file(path.parent / "out/adapter/adapter_model.safetensors")
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(again[key], value), key


# what is no checkpoint


def test_missing_directory(refused: Callable[..., str], adapter: Path) -> None:
    shutil.rmtree(adapter)
    assert f"{adapter}: no such directory; expected an adapter's checkpoint" in refused(code=2)


def test_a_file_in_place_of_a_directory(refused: Callable[..., str], adapter: Path) -> None:
    shutil.rmtree(adapter)
    adapter.write_text("weights")
    text = refused(code=2)
    assert str(adapter) in text
    assert "expected an adapter's checkpoint" in text


def test_no_configuration(refused: Callable[..., str], adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert f"{adapter}: no adapter_config.json there" in refused(code=2)


@pytest.mark.parametrize("text", [b"", b"{", b'{"peft_type": "LORA",', b"\xff\xfe\x00", b"LORA"])
def test_configuration_is_not_json(refused: Callable[..., str], adapter: Path, text: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(text)
    assert f"{adapter / 'adapter_config.json'}: not JSON" in refused()


@pytest.mark.parametrize("text", ["[]", "3", "null", '"LORA"'])
def test_configuration_is_no_mapping(refused: Callable[..., str], adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused()


def test_no_tensors(refused: Callable[..., str], adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert f"{adapter}: no adapter_model.safetensors there" in refused()


# damaged tensors


@pytest.mark.parametrize(
    "keep", [0, 5, 200, 0.5, -1], ids=["empty", "5 bytes", "in the header", "half", "less one byte"]
)
def test_truncated(refused: Callable[..., str], adapter: Path, keep: float) -> None:
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    text = refused()
    assert f"{file}: not a whole safetensors file" in text
    assert "truncated" in text


def test_header_of_a_huge_size(refused: Callable[..., str], adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    assert f"{file}: not a whole safetensors file" in refused()


def test_misshaped(refused: Callable[..., str], tensors: Callable[..., None], adapter: Path) -> None:
    tensors(lambda values: values.update({QUERY: torch.ones(5, 16)}))
    text = refused()
    assert f"{adapter}: tensor '{QUERY}' has shape [5, 16]" in text
    assert "[4, 16]" in text


def test_transposed(refused: Callable[..., str], tensors: Callable[..., None]) -> None:
    tensors(lambda values: values.update({QUERY: values[QUERY].t().contiguous()}))
    assert f"tensor '{QUERY}' has shape [16, 4]" in refused()


def test_rank_of_another_configuration(refused: Callable[..., str], configure: Callable[..., None]) -> None:
    configure(r=8)
    text = refused()
    assert "has shape [4, 16]" in text
    assert "its configuration was changed" in text


def test_missing_tensor(refused: Callable[..., str], tensors: Callable[..., None], adapter: Path) -> None:
    tensors(lambda values: values.pop(QUERY))
    text = refused()
    assert f"{adapter}: tensor '{QUERY}' is missing; of 8 tensors that its configuration asks for" in text
    assert "on this base, the file holds 7" in text
    assert 'its target_modules: ["' in text
    assert f"its tensors: {PREFIX}layers.0.query.lora_B.weight, " in text
    assert "another base" not in text


def test_no_tensor_at_all(refused: Callable[..., str], tensors: Callable[..., None]) -> None:
    tensors(lambda values: values.clear())
    assert "is missing" in refused()


def test_extra_tensors(refused: Callable[..., str], tensors: Callable[..., None], adapter: Path) -> None:
    extra = [f"{PREFIX}layers.{index}.query.lora_A.weight" for index in (7, 8)]
    tensors(lambda values: values.update({key: torch.ones(4, 16) for key in extra}))
    text = refused()
    assert f"{adapter}: 2 tensors fit no layer" in text
    assert "this base has no layers.7; layers holds 0" in text
    assert "another base" not in text
    assert f"'{extra[0]}'" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(refused: Callable[..., str], tensors: Callable[..., None], value: float) -> None:
    tensors(lambda values: values[QUERY][1].__setitem__(2, value))
    assert f"tensor '{QUERY}' contains NaN or infinity" in refused()


def test_dtype_that_is_not_read(refused: Callable[..., str], tensors: Callable[..., None]) -> None:
    tensors(lambda values: values.update({QUERY: values[QUERY].to(torch.float8_e4m3fn)}))
    assert f"tensor '{QUERY}' has dtype F8_E4M3" in refused()


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_whole_numbers_in_place_of_weights(
    refused: Callable[..., str], tensors: Callable[..., None], kind: torch.dtype
) -> None:
    tensors(lambda values: values.update({QUERY: torch.ones(4, 16, dtype=kind)}))
    assert QUERY in refused()


def test_foreign_keys(refused: Callable[..., str], tensors: Callable[..., None], adapter: Path) -> None:
    tensors(lambda values: values.update({"transformer.wte.weight": torch.ones(3)}))
    text = refused()
    assert f"{adapter}: tensor 'transformer.wte.weight' does not start with '{PREFIX}'" in text


# pickles


def as_pickle(adapter: Path) -> Path:
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    return adapter / "adapter_model.bin"


def test_pickle_is_refused(refused: Callable[..., str], adapter: Path) -> None:
    file = as_pickle(adapter)
    text = refused()
    assert f"{file} is a pickle, which can run code when opened" in text
    assert "allow_pickle: true" in text


def test_pickle_is_accepted_when_asked_for(
    cli: Callable[..., Any], spec: Callable[..., Path], adapter: Path, trained: Path
) -> None:
    as_pickle(adapter)
    path = spec(allow_pickle=True)
    result = cli("compile", path)
    assert result.code == 0, result.err
    again = load_file(path.parent / "out/adapter/adapter_model.safetensors")
    for key, value in load_file(trained / "adapter_model.safetensors").items():
        assert torch.equal(again[key], value), key


def test_truncated_pickle(refused: Callable[..., str], adapter: Path) -> None:
    file = as_pickle(adapter)
    file.write_bytes(file.read_bytes()[:300])
    assert str(file) in refused(allow_pickle=True)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("/tmp/adaptc-evil-pickle"), "ran"))


def test_pickle_that_runs_code_is_refused_even_if_allowed(refused: Callable[..., str], adapter: Path) -> None:
    file = as_pickle(adapter)
    file.write_bytes(pickle.dumps(Evil(), protocol=2))
    text = refused(allow_pickle=True)
    assert str(file) in text
    assert not Path("/tmp/adaptc-evil-pickle").exists()


def test_pickle_without_tensors(refused: Callable[..., str], adapter: Path) -> None:
    file = as_pickle(adapter)
    torch.save([1, 2, 3], file)
    assert str(file) in refused(allow_pickle=True)


# options that would change the result


def test_unknown_type(refused: Callable[..., str], configure: Callable[..., None]) -> None:
    configure(peft_type="TRAINABLE_TOKENS_OF_2031")
    text = refused()
    assert "adapter_config.json:" in text
    assert "peft_type: 'TRAINABLE_TOKENS_OF_2031' is not a method this adaptc has; it reads ADALORA" in text


def test_no_type(refused: Callable[..., str], configure: Callable[..., None]) -> None:
    configure(peft_type=None)
    assert "peft_type: required: the method's name" in refused()


def test_method_of_a_package_that_is_not_installed(
    refused: Callable[..., str], configure: Callable[..., None]
) -> None:
    configure(peft_type=None, adaptc_method="diag-shift", adaptc_options={})
    assert "method 'diag-shift' is not installed; install the package that has it" in refused()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_initialisation_that_changes_the_base(
    refused: Callable[..., str], configure: Callable[..., None], init: str
) -> None:
    configure(init_lora_weights=init)
    text = refused()
    assert f"initialised by '{init}', which changes the base's weights too" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisation_that_leaves_the_base_alone(
    cli: Callable[..., Any], spec: Callable[..., Path], configure: Callable[..., None], init: object
) -> None:
    configure(init_lora_weights=init)
    assert cli("plan", spec()).code == 0


# of another base


@pytest.mark.parametrize("command", ["plan", "compile"])
def test_base_of_another_size(refused: Callable[..., str], adapter: Path, command: str) -> None:
    text = refused(command=command, width=24)
    assert f"{adapter}: tensor '{QUERY}' has shape [4, 16]" in text
    assert "[4, 24]" in text
    assert "the adapter was trained on another base" in text


def test_other_weights_of_the_same_shapes(refused: Callable[..., str], adapter: Path, good: Path) -> None:
    shutil.rmtree(adapter)
    shutil.copytree(good / "adapter", adapter)
    text = refused(seed=1)
    assert f"{adapter}: this adapter was trained on another base: its own has SHA-256" in text


def test_layers_of_another_name(refused: Callable[..., str], configure: Callable[..., None]) -> None:
    configure(target_modules=["q_proj", "v_proj"])
    text = refused(code=2)
    assert "the target matches no" in text
    assert 'its target_modules: ["q_proj", "v_proj"]' in text
    assert f"its tensors: {PREFIX}layers.0." in text
    assert "another base" not in text
    assert "layers.0.query" in text


def test_wrapper_of_another_task(
    cli: Callable[..., Any], write: Callable[[str], Path], peft_adapter: Callable[..., Path], bert: Path
) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(bert)
    made = peft_adapter(transformers.BertForSequenceClassification(config))
    path = write(
        f"base: {{model: {bert}}}\nadapt:\n  - adapter: {made}\nemit: [{{format: peft, path: out}}]\n"
    )
    result = cli("compile", path)
    assert result.code in (1, 2), result.err
    assert "Traceback" not in result.err
    assert f"{path}:4:14: adapt.0.adapter: " in result.err
    assert "base.task" in result.err, result.err
    assert not (path.parent / "out").exists()


# several adapters in one directory


@pytest.fixture
def several(adapter: Path, tmp_path: Path) -> Path:
    """Two adapters in one directory, in an order, as adaptc writes them."""
    for name in ("one", "two"):
        shutil.copytree(adapter, tmp_path / "new" / name)
    (tmp_path / "new/adapters.json").write_text('{"order": ["one", "two"]}')
    shutil.rmtree(adapter)
    (tmp_path / "new").rename(adapter)
    return adapter


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"order": 3}', "{}", '{"order": [3]}', '{"order": ["one", "three"]}', '{"order": ["../x"]}']
)  # fmt: skip
def test_broken_order(refused: Callable[..., str], several: Path, text: str) -> None:
    (several / "adapters.json").write_text(text)
    assert str(several) in refused()


def test_one_of_several_is_damaged(refused: Callable[..., str], several: Path) -> None:
    (several / "two/adapter_model.safetensors").write_bytes(b"")
    assert f"{several}/two/adapter_model.safetensors: not a whole safetensors file" in refused()


# from Python, and as JSON


def test_types_of_the_errors(adapter: Path, spec: Callable[..., Path], tensors: Callable[..., None]) -> None:
    tensors(lambda values: values.pop(QUERY))
    with pytest.raises(WeightError, match="is missing"):
        adaptc.compile(spec())
    shutil.rmtree(adapter)
    with pytest.raises(SpecError, match="no such directory"):
        adaptc.compile(spec())


def test_nothing_on_standard_output_with_json(
    cli: Callable[..., Any], spec: Callable[..., Path], adapter: Path
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for command in ("plan", "compile"):
        result = cli(command, spec(), "--json")
        assert result.code == 1
        assert result.out == ""
        assert "not a whole safetensors file" in result.err


def test_loading_into_a_module_is_all_or_nothing(
    spec: Callable[..., Path], adapter: Path, tensors: Callable[..., None]
) -> None:
    module = adaptc.compile(spec()).module
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def damage(values: dict[str, torch.Tensor]) -> None:
        for value in values.values():
            value += 1
        values[QUERY][0, 0] = float("nan")

    tensors(damage)
    with pytest.raises(WeightError, match="NaN or infinity"):
        adaptc.load_adapter(module, adapter)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
