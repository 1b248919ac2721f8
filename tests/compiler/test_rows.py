"""Each row of a batch with its own adapter: in the module, in its artifact, and in ONNX programs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.cli.inspection import verify
from adaptc.compiler.alternatives.rows import TITLE
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError, InputError, RefusedError, SpecError
from tests.families import Zoo, close, inputs, perturb

IDS = torch.tensor([-1, 0, 1, 2, 0, 2])
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "alice": [{"method": "lora", "target": "*", "r": 4, "dropout": 0.1}],
    "bob": [{"method": "ia3", "target": "up"}, {"method": "full", "target": "down"}],
    "carol": [{"method": "lora", "target": "up", "r": 2}],
}


class Small(nn.Module):
    """Two layers with dropout between; an output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(16, 24), nn.Dropout(0.1), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(self.drop(torch.tanh(self.up(x))))}


def compiled_small(adapters: Mapping[str, Any] = ADAPTERS, **spec: Any) -> adaptc.Compiled:
    torch.manual_seed(0)
    compiled = adaptc.compile(
        {"adapters": adapters, **spec},
        model=Small(),
        example_inputs=(torch.randn(2, 5, 16),),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )
    perturb(compiled.module)
    compiled.module.eval()
    return compiled


def alone(module: Any, x: torch.Tensor, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What each row gets where its adapter is the active one."""
    results: list[torch.Tensor] = []
    for row, number in enumerate(ids):
        module.set_adapter(None if number < 0 else module.adapters[int(number)])
        results.append(module(x[row : row + 1])["y"])
    module.set_adapter(None)
    return torch.cat(results)


@pytest.fixture(scope="module")
def small() -> adaptc.Compiled:
    return compiled_small()


def test_rows_of_a_module(small: adaptc.Compiled) -> None:
    module, x = small.module, torch.randn(6, 7, 16)
    close(module(x, adapter_ids=IDS)["y"], alone(module, x))
    close(module(x=x, adapter_ids=IDS)["y"], alone(module, x))
    close(copy.deepcopy(module)(x, adapter_ids=IDS)["y"], alone(module, x))
    assert TITLE in {proof.name for proof in small.proofs}
    wide = copy.deepcopy(module).double()
    close(wide(x.double(), adapter_ids=IDS)["y"], alone(wide, x.double()))


def test_every_adapter_that_is_named_gets_its_gradient(small: adaptc.Compiled) -> None:
    module, x = copy.deepcopy(small.module), torch.randn(6, 7, 16)
    alone(module, x).square().sum().backward()
    want = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    module(x, adapter_ids=IDS)["y"].square().sum().backward()
    assert want
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            close(parameter.grad, want[name])  # type: ignore[arg-type]
    module.zero_grad()
    module(x, adapter_ids=torch.full((6,), 2))["y"].sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained = parameter.grad is not None and bool(parameter.grad.any())
            assert trained == ("carol" in name), name


def test_dropout_follows_the_mode(small: adaptc.Compiled) -> None:
    module, x = small.module, torch.randn(6, 7, 16)
    module.train()
    try:
        assert not torch.equal(module(x, adapter_ids=IDS)["y"], module(x, adapter_ids=IDS)["y"])
    finally:
        module.eval()
    assert torch.equal(module(x, adapter_ids=IDS)["y"], module(x, adapter_ids=IDS)["y"])


def test_an_adapter_that_changes_leaves_the_others_bit_for_bit(small: adaptc.Compiled) -> None:
    module, x = copy.deepcopy(small.module), torch.randn(6, 7, 16)
    before = module(x, adapter_ids=IDS)["y"]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "alice" in name:
                parameter.add_(1)
    after = module(x, adapter_ids=IDS)["y"]
    assert torch.equal(before[IDS != 0], after[IDS != 0])
    assert not torch.equal(before[IDS == 0], after[IDS == 0])


@pytest.mark.slow
def test_one_compiled_program_serves_all_users(small: adaptc.Compiled) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, module = CompileCounter(), copy.deepcopy(small.module)
    fast: Any = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    x = torch.randn(6, 7, 16)
    module(x, adapter_ids=IDS)  # makes the graph
    for shift in range(4):
        ids = (IDS + 1 + shift) % 4 - 1
        close(fast(x, adapter_ids=ids)["y"], alone(small.module, x, ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([3, 0, 0, 0, 0, 0]), "expected -1 (the base) to 2, got 3"),
        (torch.tensor([-2, 0, 0, 0, 0, 0]), "expected -1 (the base) to 2, got -2"),
        (torch.tensor([0.5]), "expected int64[batch], got torch.float32 [1]"),
    ],
)
def test_bad_ids_are_told(small: adaptc.Compiled, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match="adapter_ids") as error:
        small.module(torch.randn(6, 7, 16), adapter_ids=ids)
    assert message in str(error.value)


@pytest.mark.slow
def test_an_artifact_in_torch_has_rows(small: adaptc.Compiled, tmp_path: Path) -> None:
    small.emit("torch", tmp_path / "trainable")
    loaded, x = adaptc.load(tmp_path / "trainable").eval(), torch.randn(6, 7, 16)
    close(loaded(x, adapter_ids=IDS)["y"], alone(small.module, x))
    loaded(x, adapter_ids=IDS)["y"].sum().backward()
    trained = {name for name, p in small.module.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.grad is not None} == trained
    assert "torch artifact, rows" in {proof.name for proof in small.proofs}


def test_a_program_in_onnx(small: adaptc.Compiled, tmp_path: Path) -> None:
    path = tmp_path / "many.onnx"
    small.emit("onnx", path, adapters="rows")
    run, x = session_call(open_session(path)), torch.randn(6, 7, 16)
    close(run({"x": x, "adapter_ids": IDS})[0], alone(small.module, x).detach())
    close(run({"x": x[:1], "adapter_ids": IDS[1:2]})[0], alone(small.module, x[:1], IDS[1:2]).detach())
    about = json.loads((tmp_path / "manifest.json").read_text())["products"]["many.onnx"]
    assert about["rows"] == ["alice", "bob", "carol"]
    assert about["inputs"]["adapter_ids"] == "int64[batch]"
    assert any("computes what its graph did" in row["checked"] for row in verify(path))


def test_rows_need_adapters_and_a_batch(tmp_path: Path) -> None:
    entry = {"format": "onnx", "path": str(tmp_path / "many.onnx"), "adapters": "rows"}
    with pytest.raises(SpecError, match="there are no `adapters:` to choose from"):
        compiled_small({}, emit=[entry])
    with pytest.raises(
        SpecError, match=r"emit\.0\.adapters: rows cannot have adapters of their own: no input has"
    ):
        adaptc.compile(
            {"adapters": ADAPTERS, "emit": [entry]}, model=Small(), example_inputs=(torch.randn(2, 5, 16),)
        )
    fixed = adaptc.compile({"adapters": ADAPTERS}, model=Small(), example_inputs=(torch.randn(2, 5, 16),))
    with pytest.raises(RefusedError, match="no input has a first axis of any size"):
        fixed.module(torch.randn(2, 5, 16), adapter_ids=torch.tensor([0, 1]))
    with pytest.raises(AdaptcError, match="no input has a first axis of any size"):
        fixed.emit("onnx", tmp_path / "many.onnx", adapters="rows")


@pytest.mark.parametrize(
    "scheme",
    ["int8", pytest.param("int4", marks=pytest.mark.slow), pytest.param("nf4", marks=pytest.mark.slow)],
)
def test_a_base_in_few_bits(scheme: str, tmp_path: Path) -> None:
    block = {} if scheme == "int8" else {"block_size": 16}
    compiled = compiled_small(
        {name: ADAPTERS[name] for name in ("alice", "carol")},
        quantize=[{"method": scheme, "target": "*", **block}],
    )
    module, x = compiled.module, torch.randn(4, 7, 16)
    ids = torch.tensor([-1, 0, 1, 0])
    close(module(x, adapter_ids=ids)["y"], alone(module, x, ids))
    compiled.emit("onnx", tmp_path / "many.onnx", adapters="rows", round_activations=False)
    run = session_call(open_session(tmp_path / "many.onnx", exact=True))
    close(run({"x": x, "adapter_ids": ids})[0], alone(module, x, ids).detach(), 4 * 512)


@pytest.mark.slow
def test_a_decoder_with_a_cache(zoo: Zoo, tmp_path: Path) -> None:
    adapters = {"one": [{"method": "lora", "target": "*.q_proj", "r": 2}], "two": [{"method": "ia3"}]}
    adapters["two"][0]["target"] = "*.v_proj"
    compiled = zoo.compiled("llama", [], adapters=adapters)
    perturb(compiled.module)
    compiled.emit("onnx", tmp_path / "many.onnx", adapters="rows", cache=True)
    assert any("with a cache" in proof.name for proof in compiled.proofs)
    assert set(inputs("llama")) <= {
        value.name for value in open_session(tmp_path / "many.onnx").get_inputs()
    } | {"position_ids"}


def test_a_plan_tells_what_rows_cost(tmp_path: Path) -> None:
    entry = {"format": "onnx", "path": str(tmp_path / "many.onnx"), "adapters": "rows"}
    thin = {name: ADAPTERS[name] for name in ("alice", "carol")}
    notes = compiled_small(thin, emit=[entry]).plan.notes
    (note,) = [note for note in notes if note.startswith("rows: ")]
    assert "stacks of " in note
    assert "are computed for all rows" not in note
    apart = compiled_small(
        {**thin, "dave": [{"method": "oft", "target": "up", "r": 4}]}, emit=[entry]
    ).plan.notes
    assert any("1 values are computed for all rows and chosen" in note for note in apart)


def test_adapters_of_one_kind_are_computed_once(tmp_path: Path) -> None:
    from adaptc.compiler.alternatives.rows_graph import merged_rows

    def operations(count: int) -> int:
        adapters = {
            f"user{n}": [{"method": "lora", "target": "*", "r": 1 + n % 3, "alpha": n + 1}]
            for n in range(count)
        }
        program = compiled_small(adapters).program
        merged = merged_rows(program.graph, [other.graph for other in program.alternatives.values()])
        products = {"aten.linear.default", "aten.matmul.default", "aten.where.self"}
        return sum(name in products for name in merged.operations)

    assert operations(6) == operations(2) == 6
