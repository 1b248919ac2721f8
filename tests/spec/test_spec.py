"""What a right spec means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from pydantic import Field

from adaptc.errors import SpecError
from adaptc.inputs import InputSpec
from adaptc.methods.method import METHODS, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.site import WeightSite
from adaptc.spec.emit import HfEmit, OnnxEmit, PeftEmit, TorchEmit
from adaptc.spec.entries import AdapterEntry, MethodEntry
from adaptc.spec.spec import Spec, dump, load, require_base, resolve_path

WHOLE = """\
# every section
version: 1
base:
  model: ./all-MiniLM-L6-v2
  task: causal-lm
  dtype: float32
inputs:
  input_ids: int64[batch, seq]
  scale: float32[]
  pixels: float16[batch, 3, 224, 224]
adapt:
  - method: lora
    name: first
    target: ["*.query", "re:.*\\\\.value"]
    exclude: encoder.layer.0.*
    r: 4
    alpha: 16
    dropout: 0.05
    rank_pattern: {query: 2}
  - method: ia3
    target: {name: "*.mlp.*", type: Linear, layers: "0-5,11"}
    feedforward: ["*.down"]
  - adapter: ./my-peft-adapter
quantize: []
emit:
  - {format: torch, path: build/trainable}
  - {format: onnx, path: build/model.onnx, adapters: live, opset: 20}
  - {format: peft, path: build/adapter}
  - {format: hf, path: build/merged, max_shard_size: 1.5GB}
passes: [insert-lora, {fold: {exact: true}}, {check: }]
seed: 7
"""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(WHOLE)
    return path


def entry_of(**keys: object) -> MethodEntry:
    (entry,) = load({"adapt": [keys]}).adapt
    assert isinstance(entry, MethodEntry)
    return entry


def test_every_section(whole: Path) -> None:
    spec = load(whole)
    assert require_base(spec).model == "./all-MiniLM-L6-v2"
    assert require_base(spec).task == "causal-lm"
    assert list(spec.inputs.values()) == [
        InputSpec("input_ids", "int64", ("batch", "seq")),
        InputSpec("scale", "float32", ()),
        InputSpec("pixels", "float16", ("batch", 3, 224, 224)),
    ]
    lora, ia3, adapter = spec.adapt
    assert isinstance(lora, MethodEntry)
    assert (lora.method, lora.name, lora.target) == ("lora", "first", ("*.query", "re:.*\\.value"))
    assert lora.exclude == ("encoder.layer.0.*",)
    assert isinstance(ia3, MethodEntry)
    assert ia3.target == {"name": "*.mlp.*", "type": "Linear", "layers": "0-5,11"}
    assert ia3.options() == {"feedforward": ("*.down",)}
    assert adapter == AdapterEntry(adapter="./my-peft-adapter")
    assert spec.emit == (
        TorchEmit(format="torch", path="build/trainable"),
        OnnxEmit(format="onnx", path="build/model.onnx", adapters="live", opset=20),
        PeftEmit(format="peft", path="build/adapter"),
        HfEmit(format="hf", path="build/merged", max_shard_size="1.5GB"),
    )
    assert spec.passes == ("insert-lora", {"fold": {"exact": True}}, {"check": {}})
    assert spec.seed == 7


def test_an_entry_builds_its_method() -> None:
    entry = entry_of(method="lora", target="all-linear", r=4, alpha=16, rank_pattern={"q": 2})
    built = entry.build()
    assert type(built) is METHODS["lora"]
    assert entry.options() == {
        "r": 4, "alpha": 16.0, "dropout": 0.0, "rslora": False, "rank_pattern": {"q": 2}, "alpha_pattern": {},
        "biases": "none", "lora_bias": False, "init_weights": True, "loftq_iter": 1,
    }  # fmt: skip
    assert built == METHODS["lora"](**entry.options())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_defaults_are_the_methods_own(name: str) -> None:
    entry = entry_of(method=name, target="all-linear")
    assert entry.build() == METHODS[name]()
    assert (entry.name, entry.exclude) == ("default", ())


@pytest.mark.parametrize(
    ("spelling", "option", "value"),
    [("lora_alpha", "alpha", 3.0), ("lora_dropout", "dropout", 0.5), ("use_rslora", "rslora", True)],
)
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_other_spellings_of_an_option(name: str, spelling: str, option: str, value: object) -> None:
    assert entry_of(method=name, target="x", **{spelling: value}).options()[option] == value
    assert entry_of(method=name, target="x", **{option: value}).options()[option] == value


def test_targets_are_patterns_or_a_mapping() -> None:
    assert entry_of(method="lora", target="all-linear").target == ("all-linear",)
    assert entry_of(method="lora", target=["a", "b"], exclude=["c"]).exclude == ("c",)
    assert entry_of(method="lora", target={"layers": 3}).target == {"layers": "3"}


def test_what_is_left_out() -> None:
    spec = load({})
    assert dump(spec) == dump(Spec(version=1))
    assert dump(spec) == {
        "version": 1,
        "inputs": {},
        "adapt": [],
        "adapters": {},
        "quantize": [],
        "emit": [],
        "seed": 0,
    }
    base = require_base(load({"base": {"model": "m"}}))
    assert (base.task, base.dtype, base.trust_remote_code) == ("feature-extraction", None, False)
    (onnx,) = load({"emit": [{"format": "onnx", "path": "x"}]}).emit
    assert onnx == OnnxEmit(format="onnx", path="x", adapters="folded", opset=None)


def test_a_factory_has_arguments_and_inputs() -> None:
    spec = load(
        {"base": {"python": "pkg.mod:build", "args": {"width": 64}}, "inputs": {"x": "float32[batch, 8]"}}
    )
    assert require_base(spec).args == {"width": 64}


def test_overrides_apply_in_order(whole: Path) -> None:
    spec = load(
        whole, ["base.dtype=bfloat16", "adapt.0.r=32", "adapt.0.r=16", "inputs.extra=bool[batch]", "passes="]
    )
    assert require_base(spec).dtype == "bfloat16"
    assert isinstance(spec.adapt[0], MethodEntry)
    assert spec.adapt[0].options()["r"] == 16
    assert spec.inputs["extra"] == InputSpec("extra", "bool", ("batch",))
    assert spec.passes is None
    assert load(whole).seed == load(spec, ["seed=7"]).seed
    assert load(spec, ["seed=8"]).adapt[0].options()["r"] == 16  # type: ignore[union-attr]


def test_overrides_leave_the_mapping_alone() -> None:
    given = {"adapt": [{"method": "lora", "target": "x", "r": 4}], "base": None}
    spec = load(given, ["adapt.0.r=8", "base.model=m"])
    assert given == {"adapt": [{"method": "lora", "target": "x", "r": 4}], "base": None}
    assert require_base(spec).model == "m"


def test_a_spec_is_taken_as_it_is(whole: Path) -> None:
    spec = load(whole)
    assert load(spec) is spec
    assert load(str(whole)).seed == 7


def test_a_spec_cannot_be_changed(whole: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(whole).seed = 3  # type: ignore[misc]


def test_dump_is_read_back(whole: Path) -> None:
    dumped = dump(load(whole))
    assert dumped["inputs"]["input_ids"] == "int64[batch, seq]"
    assert dumped["adapt"][0]["rslora"] is False
    assert dump(load(dumped)) == dumped


def test_dump_takes_any_argument_of_a_factory() -> None:
    spec = load({"base": {"python": "a:b", "args": {"kind": int, "none": None}}, "inputs": {"x": "bool[n]"}})
    assert require_base(spec).args["kind"] is int
    assert dump(spec)["base"]["args"] == {"kind": "<class 'int'>", "none": None}


def test_paths_count_from_the_spec(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole.parent)
    assert load("spec.yaml").directory == whole.parent
    assert resolve_path(load("spec.yaml"), "build/x") == whole.parent / "build/x"
    assert resolve_path(load({}), "x") == Path.cwd() / "x"
    assert resolve_path(load(whole), "/x") == Path("/x")


def test_paths_may_be_paths() -> None:
    spec = load({"base": {"model": Path("a/b")}, "emit": [{"format": "torch", "path": Path("out")}]})
    assert require_base(spec).model == "a/b"
    assert spec.emit[0].path == "out"


def test_yaml_that_is_read_as_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfversion: 1\r\n"
        b"base: {python: 'a:b', args: {day: 2024-01-02, small: 1e-3, no: no, 1: ~}}\r\n"
        b"inputs: {x: 'float32[n]'}\r\n"
        b"adapt:\r\n- &one {method: lora, target: x}\r\n- *one\r\n"
    )
    spec = load(path)
    assert require_base(spec).args == {"day": "2024-01-02", "small": 0.001, "no": "no", "1": None}
    assert spec.adapt[0] == spec.adapt[1]


@pytest.fixture
def own_method() -> Iterator[None]:
    @method("own-method")
    @dataclass(frozen=True)
    class Own(WeightMethod):
        """W' = W + s"""

        mode: Literal["a", "b"]
        sizes: Annotated[tuple[int, ...], Field(min_length=2)] = (1, 2)

        kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

        def params(self, site: WeightSite) -> dict[str, Param]:
            return {"s": Param((site.out_features, 1), "zeros", "s")}

        def weight(self, W: torch.Tensor, *, s: torch.Tensor) -> torch.Tensor:
            return W + s

    yield
    METHODS.forget("own-method")


@pytest.mark.usefixtures("own_method")
def test_a_method_registered_later_is_known() -> None:
    entry = entry_of(method="own-method", target="x", mode="b", sizes=[3, 4])
    assert entry.options() == {"mode": "b", "sizes": (3, 4)}
    with pytest.raises(SpecError, match=r"adapt.0.mode: required, but missing"):
        entry_of(method="own-method", target="x")
    with pytest.raises(SpecError, match=r"adapt.0.sizes.1: expected a whole number, got 'x'"):
        entry_of(method="own-method", target="x", mode="a", sizes=[3, "x"])


@pytest.mark.parametrize("text", ["int64[batch, seq]", "bool[]", "float16[1, n]"])
def test_an_input_is_written_as_it_is_read(text: str) -> None:
    assert str(InputSpec.parse("x", text)) == text


def test_reading_a_spec_imports_no_torch(whole: Path) -> None:
    code = (
        "import sys; from adaptc.spec.spec import dump, load, schema; dump(load(sys.argv[1])); schema();"
        " print(*sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
