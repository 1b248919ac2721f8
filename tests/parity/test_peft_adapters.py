"""Several adapters of one PEFT model: its folders in and out, each with its head, and each row with its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.checkpoints.adapter import of_name, saved_together
from adaptc.cli.inspection import inspect
from adaptc.cli.starter import starter_spec
from adaptc.compiler.driver import plan
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import SpecError
from tests.families import Zoo, close, differs, inputs, perturb

peft = pytest.importorskip("peft")
NAMES = ("default", "alice", "bob")
IDS = torch.tensor([2, -1, 0, 1, 0])


def trained(zoo: Zoo, folder: Path, heads: bool) -> Any:
    """A PEFT model with three LoRA adapters of different ranks and scales, saved to a folder."""
    more: dict[str, Any] = {"modules_to_save": ["classifier"]} if heads else {}
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)
        for rank, alpha, targets in (
            (4, 8, ["query", "value"]),
            (2, 7, ["query"]),
            (6, 3, ["value", "dense"]),
        )
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(zoo.fresh("bert"), configs[0])
        for name, config in zip(NAMES[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
    for number, name in enumerate(NAMES):
        model.set_adapter(name)
        perturb(model, seed=number)
    model.save_pretrained(folder)
    return model.eval()


def by_adapter(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits of a PEFT model, or of a module of adaptc's, with each adapter."""
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in NAMES:
            model.set_adapter(name)
            values[name] = model(**batch).logits
    return values


@pytest.mark.slow
def test_a_folder_of_several_adapters_in_and_out(zoo: Zoo, tmp_path: Path) -> None:
    model = trained(zoo, tmp_path / "saved", heads=True)
    batch = inputs("bert", 3, pad=True)
    want = by_adapter(model, batch)
    differs(want["alice"], want["bob"])
    assert saved_together(tmp_path / "saved") == {
        "default": tmp_path / "saved",
        "alice": tmp_path / "saved" / "alice",
        "bob": tmp_path / "saved" / "bob",
    }
    compiled = adaptc.compile(
        {"base": zoo.base_of("bert"), "adapters": {"alice": [{"adapter": str(tmp_path / "saved")}]}}
    )
    module: Any = compiled.module.eval()
    module.add_adapter("default", tmp_path / "saved")
    module.add_adapter("bob", tmp_path / "saved" / "bob")
    got = by_adapter(module, batch)
    for name in NAMES:
        close(got[name], want[name])
    for name in NAMES:
        module.save_adapter(name, tmp_path / "again" / name)
    again = peft.PeftModel.from_pretrained(zoo.fresh("bert"), tmp_path / "again" / "default")
    for name in NAMES[1:]:
        again.load_adapter(tmp_path / "again" / name, name)
    values = by_adapter(again.eval(), batch)
    for name in NAMES:
        close(values[name], want[name])


@pytest.mark.slow
def test_rows_are_those_of_adapter_names(zoo: Zoo, tmp_path: Path) -> None:
    model = trained(zoo, tmp_path / "saved", heads=False)
    adapters = {name: [{"adapter": str(of_name(tmp_path / "saved", name))}] for name in NAMES}
    compiled = adaptc.compile({"base": zoo.base_of("bert"), "adapters": adapters})
    batch = inputs("bert", len(IDS), pad=True)
    with torch.no_grad():
        names = [NAMES[int(number)] if number >= 0 else "__base__" for number in IDS]
        want = model(**batch, adapter_names=names).logits
        close(compiled.module.eval()(**batch, adapter_ids=IDS).logits, want)
    compiled.emit("onnx", tmp_path / "many.onnx", adapters="rows")
    close(session_call(open_session(tmp_path / "many.onnx"))({**batch, "adapter_ids": IDS})[0], want)


def test_a_folder_of_several_adapters_is_told(zoo: Zoo, tmp_path: Path) -> None:
    trained(zoo, tmp_path / "saved", heads=False)
    told = [row["value"] for row in inspect(tmp_path / "saved") if row["what"] == "adapter"]
    assert [Path(path).name for path in told] == ["saved", "alice", "bob"]
    text = starter_spec(zoo.directory("bert"), tmp_path / "saved", tmp_path).text
    (tmp_path / "spec.yaml").write_text(text)
    assert "  alice: [{adapter: ./saved/alice}]" in text
    _, planned = plan(tmp_path / "spec.yaml")
    assert list(planned.alternatives) == ["default", "alice", "bob"]
    for file in (tmp_path / "saved").glob("adapter_*"):
        file.unlink()
    entry = {"adapter": str(tmp_path / "saved")}
    with pytest.raises(
        SpecError, match="holds the adapters alice, bob, each in a folder of its own; name one"
    ):
        adaptc.compile({"base": zoo.base_of("bert"), "adapt": [entry]})
