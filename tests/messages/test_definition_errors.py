"""What authors of methods, schemes and passes are told of their mistakes, and on which line."""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import DefinitionError
from adaptc.methods.method import METHODS
from adaptc.methods.trial import TRIALS
from adaptc.quantization import trial as scheme_trial
from adaptc.quantization.scheme import SCHEMES, scheme_of
from adaptc.registry.definitions import RESERVED, check_class, check_options
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.entries import AdapterEntry, MethodEntry, QuantizeEntry

HEAD = """\
from dataclasses import dataclass, field
from typing import ClassVar
import random, torch
from adaptc import ActivationMethod, AttentionMethod, Fault, Graph, InputMethod, Param, Pass, WeightMethod
from adaptc import graph_pass, method, scheme
"""
METHOD = """\
@method("probe-method")
@dataclass(frozen=True)
class Probe(WeightMethod):
    '''W' = W + s 1^T'''
    gain: float = 1.0
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    def params(self, site):
        return {"s": Param((site.out_features, 1), "zeros", "s")}
    def weight(self, W, *, s):
        return W + self.gain * s
"""
SCHEME = """\
from adaptc.quantization.scheme import Scheme, StoredTensor
@scheme("probe-scheme")
@dataclass(frozen=True)
class Probe(Scheme):
    '''W = s round(W / s)'''
    steps: int = 127
    def stored(self, rows, columns):
        return {"codes": StoredTensor((rows, columns), "int8"), "scale": StoredTensor((rows, 1), "float32")}
    def quantize(self, W, inputs=None):
        scale = W.abs().amax(1, keepdim=True) / self.steps
        return {"codes": (W / scale).round().to(torch.int8), "scale": scale}
    def dequantize(self, rows, columns, tensors):
        return tensors["codes"].float() * tensors["scale"]
"""
PASS = """\
@graph_pass("probe-pass")
@dataclass(frozen=True)
class Probe(Pass):
    '''The same graph.'''
    takes: ClassVar[frozenset[str]] = frozenset({"traced"})
    leaves: ClassVar[str | None] = None
    def call(self, graph):
        return False
"""
_files = itertools.count()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Whatever a test registers is taken out again."""
    tables: list[Any] = [METHODS, PASSES, SCHEMES]
    before = [set(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            table.forget(name)


def define(tmp_path: Path, text: str) -> tuple[dict[str, Any], Path]:
    """Run a file of an author; gives its names, and its path."""
    path = tmp_path / f"authors_{next(_files)}.py"
    path.write_text(HEAD + textwrap.dedent(text))
    return run(path, path.stem), path


def run(path: Path, module: str) -> dict[str, Any]:
    """Run a file as a module; gives its names."""
    linecache.checkcache(str(path))
    if module != "__main__":
        sys.modules[module] = types.ModuleType(module)
    names: dict[str, Any] = {"__name__": module}
    exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), names)
    return names


def told(tmp_path: Path, text: str) -> tuple[str, str]:
    """What an author is told, and the source line that it names."""
    with pytest.raises(DefinitionError) as caught:
        define(tmp_path, text)
    message = str(caught.value)
    place = caught.value.place.split("    ")[0]
    path, _, number = place.rpartition(":")
    return message, Path(path).read_text().splitlines()[int(number) - 1].strip()


MISTAKES: list[tuple[str, str, str, str]] = [
    ('"probe-method"', '"Probe"', "a method's name is lower case with hyphens, got 'Probe'", "class Probe"),
    ("@dataclass(frozen=True)\n", "@dataclass\n", "write @method above @dataclass(frozen=True)", "class Probe"),
    ("@dataclass(frozen=True)\n", "", "write @method above @dataclass(frozen=True)", "class Probe"),
    ("(WeightMethod)", "", "a method is a class that extends WeightMethod, ActivationMethod", "class Probe"),
    ("gain: float", "seed: float", "the option 'seed' has a name that adaptc uses itself", "seed: float"),
    ("gain: float", "target: float", "the option 'target' has a name that adaptc uses itself", "target: float"),
    ("gain: float", "params: float", "the option 'params' has a name that adaptc uses itself", "def params"),
    ("gain: float", "model_size: float", "the option 'model_size' cannot be a key of a spec", "model_size"),
    ("gain: float = 1.0", "gain: float = 'x'", "the default of the option 'gain' is 'x'", "gain: float"),
    ("gain: float", "gain: 'Gain'", "the types of its options cannot be read: name 'Gain'", "gain: 'Gain'"),
    ("gain: float", "gain: torch.Tensor", "cannot be validated by the type of the option 'gain'", "gain: torch"),
    ("    kinds: ClassVar[frozenset[str]] =", "    kinds: frozenset =", "kinds is no option", "kinds: frozenset"),
    ('frozenset({"linear"})', '"linear"', "kinds is a set of names, got 'linear'", "kinds:"),
    ('{"linear"}', '{"Linear"}', "kinds: unknown 'Linear'; did you mean 'linear'?", "kinds:"),
    ('{"linear"}', '{"sub-layer"}', "kinds: unknown 'sub-layer'", "kinds:"),
    ("def weight", "def wieght", "the expression that it inserts; it defines 'wieght'; did you mean", "class"),
    ("def params", "def parameters", "it defines no params or shared", "class Probe"),
    ("def params(self, site)", "def params(self)", "params() cannot be called as params(site)", "def params"),
    ("weight(self, W, *, s)", "weight(self, *, s)", "weight(*, s) cannot be called as weight(W", "def weight"),
    ("weight(self, W, *, s)", "weight(self, W, s, /)", "s cannot be given by name", "def weight"),
    ("weight(self, W, *, s)", "weight(self, W, *, t)", "cannot be called as weight(W, s=...)", "def weight"),
    ("(site.out_features, 1)", "[site.out_features, 1]", "the shape of a Param is a tuple", 'return {"s": Param'),
    ('"zeros"', '"zero"', "got 'zero'; did you mean 'zeros'?", 'return {"s": Param'),
    ('"zeros", "s"', '"zeros", ""', "the key of a Param is its name in checkpoints, got ''", 'return {"s"'),
    ('"zeros"', "lambda W: W[:, :1]", "the init of 's' fails: TypeError", 'return {"s": Param'),
    ('"zeros"', "lambda W, g: W", "the init of 's' gives [24, 16], its shape is (24, 1)", "def params"),
    ("site.out_features", "site.outputs", "params fails: AttributeError", 'return {"s": Param'),
    ('{"s": Param', '{"W": Param', "params: 'W' is the name of what the expression changes", "def params"),
    ('return {"s": Param((site.out_features, 1), "zeros", "s")}', "return None", "a dict of Params", "def params"),
    ("return W + self.gain * s", "return W.add_(s)", "in place: add_ writes into W", "return W.add_"),
    ("return W + self.gain * s", "W[0] += s[0]; return W", "in place: add_ writes into W", "W[0] += s"),
    ("return W + self.gain * s", "s.mul_(2); return W + s", "in place: mul_ writes into s", "s.mul_(2)"),
    ("return W + self.gain * s", "W + s", "weight gives a tensor, got NoneType", "def weight"),
    ("return W + self.gain * s", "return (W + s)[:4]", "a tensor of W's shape [24, 16], got [4, 16]", "def weight"),
    ("return W + self.gain * s", "return (W + s).double()", "dtype, torch.float32, got torch.float64", "def weight"),
    ("return W + self.gain * s", "return W + s * torch.ones(1)", "torch.bfloat16, got torch.float32", "def weight"),
    ("return W + self.gain * s", "return W + s if s.sum() > 0 else W", "depends on the values of a tensor", "return W"),
    ("return W + self.gain * s", "return W + s + 1", "the model before anything is trained, by 1", "def weight"),
    ("return W + self.gain * s", "return W + s * torch.rand(1)", "weight draws random numbers: rand", "return W"),
    ("return W + self.gain * s", "return W + s * random.random()", "draws no random numbers", "def weight"),
    ("(site.out_features, 1)", "(site.out_features,)", "on W of shape [24, 16]: RuntimeError: The size", "return W"),
    ("def params", "def refuse(self, site): return None\n    def params", "did you mean 'refuses'?", "def refuse"),
    ("    kinds", "    identity_at_int = False\n    kinds", "did you mean 'identity_at_init'?", "identity_at_int"),
    ('@method("probe-method")', "@method", 'write @method("a-name")', "class Probe"),
    ("return W + self.gain * s", "return W + s.detach()", "get no gradient to s", "def weight"),
    ("return W + self.gain * s", "return W + gian * s", "shape [24, 16]: NameError: name 'gian'", "return W + gian"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "words", "line"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_a_mistake_in_a_method_is_told_when_it_is_registered(
    tmp_path: Path, right: str, wrong: str, words: str, line: str
) -> None:
    assert right in METHOD
    message, named = told(tmp_path, METHOD.replace(right, wrong, 1))
    assert words in message
    assert line in named, (named, message)
    assert "probe-method" not in METHODS


def test_what_is_right_is_registered(tmp_path: Path) -> None:
    names, _ = define(tmp_path, METHOD)
    assert METHODS["probe-method"] is names["Probe"]


def test_fields_of_another_kind_of_aliases(tmp_path: Path) -> None:
    head = "    aliases: ClassVar = "
    message, line = told(tmp_path, METHOD.replace("    kinds", f"{head}{{'scale': 'gian'}}\n    kinds", 1))
    assert (
        "aliases: 'scale' is another spelling of 'gian', which is no option; did you mean 'gain'?" in message
    )
    assert line.startswith("aliases")


def test_a_refusal_is_a_fault(tmp_path: Path) -> None:
    refuses = "    def refuses(self, site):\n        return ('gain',), 'no'\n"
    message, line = told(tmp_path, METHOD + refuses)
    assert "refuses gives a Fault or None, got (('gain',), 'no')" in message
    assert line.startswith("def refuses")


PASSES_WRONG = [
    ('"probe-pass"', '"insert"', "the name means something else in a spec", "class Probe"),
    ('"probe-pass"', '"insert-probe"', "inserts a method or quantizes by a scheme", "class Probe"),
    ("(Pass)", "", "a pass is a class that extends Pass", "class Probe"),
    ("@dataclass(frozen=True)\n", "", "write @graph_pass above @dataclass(frozen=True)", "class Probe"),
    ('{"traced"}', '{"trace"}', "takes: unknown 'trace'; did you mean 'traced'?", "takes:"),
    ("= None", "= 'fold'", "leaves: unknown stage 'fold'; did you mean 'folded'?", "leaves:"),
    (
        "def call",
        "def cal",
        "it defines no call, which rewrites the graph; it defines 'cal'; did you mean 'call'?",
        "class Probe",
    ),
    ("call(self, graph)", "call(self)", "call() cannot be called as call(graph)", "def call"),
]


@pytest.mark.parametrize(("right", "wrong", "words", "line"), PASSES_WRONG, ids=[m[1] for m in PASSES_WRONG])
def test_a_mistake_in_a_pass(tmp_path: Path, right: str, wrong: str, words: str, line: str) -> None:
    message, named = told(tmp_path, PASS.replace(right, wrong, 1))
    assert words in message
    assert line in named


SCHEMES_WRONG = [
    ("steps: int", "scheme: int", "the option 'scheme' has a name that adaptc uses itself", "scheme: int"),
    ("def stored", "def kept", "it defines no stored, which every scheme has", "class Probe"),
    (
        "stored(self, rows, columns)",
        "stored(self, shape)",
        "cannot be called as stored(rows, columns)",
        "def stored",
    ),
    (
        '"int8"), "scale"',
        '"int8"), "scales"',
        "quantize gives codes, scale, stored says codes, scales",
        "def quantize",
    ),
    (
        'columns), "int8"',
        'columns), "uint8"',
        "quantize gives codes as torch.int8 [8, 64], stored",
        "def quantize",
    ),
    (
        "W.abs().amax",
        "W.abs_().amax",
        "quantize changes its arguments in place: abs_ writes into W",
        "scale = W.abs_",
    ),
    (
        '["codes"].float()',
        '["codes"].double()',
        "dequantize gives torch.float32 [8, 64], got",
        "def dequantize",
    ),
    (
        'tensors["codes"].float()',
        'tensors["code"].float()',
        "dequantize fails: KeyError: 'code'",
        "return tensors",
    ),
]


@pytest.mark.parametrize(
    ("right", "wrong", "words", "line"), SCHEMES_WRONG, ids=[m[1] for m in SCHEMES_WRONG]
)
def test_a_mistake_in_a_scheme(tmp_path: Path, right: str, wrong: str, words: str, line: str) -> None:
    message, named = told(tmp_path, SCHEME.replace(right, wrong, 1))
    assert words in message
    assert line in named
    assert "probe-scheme" not in SCHEMES


def test_a_scheme_of_ones_own_replaces_its_earlier_self(tmp_path: Path) -> None:
    path = tmp_path / "cell.py"
    for steps in (127, 7):
        path.write_text(HEAD + SCHEME.replace("127", str(steps)))
        run(path, "__main__")
        assert scheme_of("probe-scheme").steps == steps  # type: ignore[attr-defined]
        made = compiled(quantize=[{"method": "probe-scheme", "target": "0"}])
        assert "probe-scheme" in made.graph.quantized["0.weight"].scheme.text


def test_two_authors_of_one_name_are_both_named(tmp_path: Path) -> None:
    _, first = define(tmp_path, METHOD)
    message, line = told(tmp_path, METHOD.replace("Probe", "Other"))
    assert f"method 'probe-method' is registered already, by {first.stem}.Probe at {first}:8" in message
    assert line == "class Other(WeightMethod):"
    message, _ = told(tmp_path, METHOD.replace("probe-method", "lora"))
    assert "method 'lora' is registered already, by adaptc.passes.insert.lora.Lora at " in message


MODEL = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def compiled(**spec: Any) -> Any:
    return adaptc.compile(spec, model=MODEL, example_inputs=(torch.randn(3, 8),))


def test_what_is_registered_later_is_known_and_replaced(tmp_path: Path) -> None:
    """A notebook: something is compiled, then a method and a pass are written, used, changed and used again."""
    compiled(adapt=[{"method": "lora", "target": "0", "r": 2}])
    path = tmp_path / "cell.py"
    for text in (
        METHOD,
        METHOD.replace("gain: float", "strength: float").replace("self.gain", "self.strength"),
    ):
        path.write_text(HEAD + text)
        run(path, "__main__")
        option = "gain" if "gain: float" in text else "strength"
        made = compiled(adapt=[{"method": "probe-method", "target": "0", option: 2.0}])
        assert made.plan.entries[0].insert.method == METHODS["probe-method"](**{option: 2.0})
        assert option in str(adaptc.Spec.model_json_schema())
        assert getattr(adaptc.passes.InsertProbeMethod(target="0", **{option: 3.0}).method, option) == 3.0
    with pytest.raises(adaptc.SpecError, match="unknown key 'gain'"):
        compiled(adapt=[{"method": "probe-method", "target": "0", "gain": 2.0}])
    define(tmp_path, PASS.replace('{"traced"}', '{"adapted"}'))
    made = compiled(adapt=[{"method": "lora", "target": "0", "r": 2}], passes=["insert", "probe-pass"])
    assert "probe-pass" in [record.name for record in made.records]


def test_a_write_that_no_trial_can_see_is_refused_when_it_is_inserted(tmp_path: Path) -> None:
    text = METHOD.replace("gain: float = 1.0", "gain: float").replace(
        "return W + self.gain * s", "return W.add_(s)"
    )
    define(tmp_path, text)
    before = MODEL[0].weight.detach().clone()
    with pytest.raises(DefinitionError, match="add_ writes into W") as caught:
        compiled(adapt=[{"method": "probe-method", "target": "0", "gain": 1.0}])
    assert "return W.add_(s)" in str(caught.value)
    assert torch.equal(MODEL[0].weight, before)


def test_an_unknown_option_of_a_made_pass_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"InsertLora: unknown option 'alhpa'; did you mean 'alpha'\?"):
        adaptc.passes.InsertLora(target="0", alhpa=4)
    with pytest.raises(TypeError, match="expected a method such as"):
        adaptc.passes.Insert("lora", target="0")


@pytest.mark.parametrize("name", [*METHODS])
def test_what_is_checked_of_authors_holds_for_what_is_shipped(name: str) -> None:
    cls, author = METHODS[name], METHODS.author(name)
    base = next(c for c in cls.__mro__ if "expressions" in vars(c))
    elsewhere = dataclasses.replace(author, module="authors")
    definition = check_class("method", name, cls, base, "", elsewhere)
    check_options(definition)
    TRIALS.try_out(definition)


@pytest.mark.parametrize("registry", [SCHEMES, PASSES], ids=["schemes", "passes"])
def test_options_of_shipped_schemes_and_passes(registry: Any) -> None:
    for name, cls in registry.items():
        author = dataclasses.replace(registry.author(name), module="authors")
        definition = check_class(registry.kind, name, cls, cls.__mro__[-2], "", author)
        check_options(definition)
        if registry is SCHEMES:
            scheme_trial.TRIALS.try_out(definition)


def test_every_name_that_entries_and_passes_use_is_reserved() -> None:
    used = {*MethodEntry.model_fields, *AdapterEntry.model_fields, *QuantizeEntry.model_fields}
    used |= {f.name for cls in (Insert, Quantize) for f in dataclasses.fields(cls)}
    assert used - {"r"} <= RESERVED  # r is an option of methods, and of trained adapters with ranks
