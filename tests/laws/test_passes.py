"""What holds for every pass, and what the runner does not let a pass do."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.changes import comparison
from adaptc.compiler.proof import batches, prove, randomised, tolerance
from adaptc.emit.onnx.casts import Casts
from adaptc.emit.onnx.decompose import OnnxOperations
from adaptc.emit.onnx.evaluate import Evaluate
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.rounding import RoundActivations
from adaptc.errors import AdaptcError, RefusedError, SpecError, VerifyError, WeightError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter
from adaptc.ir.module import bind
from adaptc.ir.stages import STAGES
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES, Pass, PassRecord, check_order, graph_pass, run
from adaptc.weights import Held
from tests.families import Mlp, Zoo, close, differs, inputs, outputs, perturbed, randomise, small

aten = torch.ops.aten
NAMES = tuple(load_passes())
INSERTS = tuple(name for name in NAMES if name.startswith(("insert-", "quantize-")))
OTHERS = tuple(name for name in NAMES if name not in INSERTS)


def default(name: str, **options: Any) -> Any:
    """A pass with its default options; `nowhere` as the target of one that wants a target."""
    made: Any = load_passes()[name]
    if name.startswith("quantize-"):
        return made(**({"target": "nowhere"} | dict(made.body.small) | options))
    if name.startswith("insert-"):
        return made(**({"target": "nowhere"} | small(made.body.name) | options))
    return made(**options)


def skip_without_site(zoo: Zoo, item: Any) -> None:
    if isinstance(item, Insert) and not item.selection(zoo.graph("mlp")).sites:
        pytest.skip(f"{item.name} sits on {sorted(item.method.kinds)}")


def at_stage(zoo: Zoo, stage: str, name: str = "mlp") -> Graph:
    """A graph at a stage, with a perturbed LoRA where it has adapters."""
    graph = zoo.graph(name)
    if stage == "traced":
        return graph
    graph = run(graph, [default("insert-lora", target="*", r=4)])
    graph.weights.update(
        {n: Held(v) for n, v in perturbed({n: graph.weights[n].load() for n in graph.adapter_names}).items()}
    )
    if stage in ("factored", "folded"):
        graph = run(graph, [default(stage.removesuffix("ed"))])
    return graph


def snapshot(graph: Graph) -> tuple[Any, ...]:
    return (
        graph.text(),
        graph.stage,
        dict(graph.weights),
        dict(graph.aliases),
        list(graph.adaptations),
        dict(graph.adapted_weights),
        [n for n, _ in graph.module.named_parameters()],
        [dict(node.meta) for node in graph.nodes],
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do_is_refused_or_changes_nothing(zoo: Zoo, name: str) -> None:
    """No site matches, or no adapter is there."""
    if name == "gradient-checkpointing":
        pytest.skip("there is always something to compute again")
    item = default(name)
    for stage in sorted(item.takes, key=STAGES.index):
        if name in OTHERS and stage != "traced":
            graph = dataclasses.replace(
                zoo.graph("mlp").copy(), stage=stage
            )  # of that stage, without an adapter
        else:
            graph = at_stage(zoo, stage)
        before, records = graph.text(), list[PassRecord]()
        refusals = item.requires(graph.copy())
        if refusals:
            assert all(refusal.reason for refusal in refusals)
            with pytest.raises(RefusedError):
                run(graph, [item])
            continue
        after = run(graph, [item], records)
        assert after.text() == before
        assert [record.modified for record in records] == [False]
        assert records[0].nodes_before == records[0].nodes_after


@pytest.mark.parametrize("name", INSERTS)
def test_a_target_that_matches_nothing_is_refused_by_name(zoo: Zoo, name: str) -> None:
    with pytest.raises(RefusedError, match="nowhere"):
        run(zoo.graph("mlp"), [default(name)])


@pytest.mark.parametrize("name", NAMES)
def test_run_leaves_its_input_alone(zoo: Zoo, name: str) -> None:
    cls = load_passes()[name]
    stage = "traced" if name in INSERTS else min(cls.takes, key=STAGES.index)
    graph, tensors = at_stage(zoo, stage), inputs("mlp", 4)
    if name in ("quantized-products", "dequantize"):
        graph = run(graph, [default("quantize-nf4", target="*")])
    if name == "plain-integers":
        chosen = dataclasses.replace(graph, calibration_rows=[inputs("mlp", 9)])
        graph = run(chosen, [default("quantize-gptq", target="re:up|down"), default("quantized-products")])
    if name == "torch-kernels":  # there are some for bfloat16 only
        bits = [load_passes()["quantize-int8"](target="*"), default("quantized-products")]  # type: ignore[call-arg]
        graph, tensors = run(zoo.graph("mlp", "bfloat16"), bits), {"x": inputs("mlp", 4)["x"].bfloat16()}
    item = default(name, **({"target": "*"} if name in INSERTS else {}))
    skip_without_site(zoo, item)
    before = snapshot(graph)
    with torch.no_grad():
        value = outputs(bind(graph).eval(), tensors, graph.outputs)["output"]
    after = run(graph, [item])
    assert after.text() != graph.text()
    assert snapshot(graph) == before
    with torch.no_grad():
        assert torch.equal(outputs(bind(graph).eval(), tensors, graph.outputs)["output"], value)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_deterministic(zoo: Zoo, name: str) -> None:
    stage = "traced" if name in INSERTS else min(load_passes()[name].takes, key=STAGES.index)
    item = default(name, **({"target": "*"} if name in INSERTS else {}))
    skip_without_site(zoo, item)
    graph = at_stage(zoo, stage)
    assert run(graph, [item]).text() == run(graph, [item]).text()


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_states_its_stages_and_its_name(zoo: Zoo, name: str) -> None:
    cls = load_passes()[name]
    assert cls.name == name
    assert set(cls.takes) <= set(STAGES)
    assert cls.leaves in (*STAGES, None)
    assert (cls.__doc__ or "").strip()
    assert dataclasses.is_dataclass(default(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        default(name).anything = 1


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_at_the_wrong_stage_says_which_it_takes(zoo: Zoo, name: str) -> None:
    item = default(name)
    for stage in STAGES:
        words = check_order([item], stage)
        if stage in item.takes:
            assert words is None
            continue
        assert words is not None
        assert name in words
        assert stage in words
        graph = dataclasses.replace(zoo.graph("mlp").copy(), stage=stage)
        with pytest.raises(RefusedError) as caught:
            run(graph, [item])
        assert str(caught.value) == words


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (["fold", "insert"], "fold"),
        (["insert", "fold", "factor"], "factor"),
        (["insert", "factor", "fold"], "fold"),
    ],
)
def test_an_impossible_order_in_a_spec_is_an_error(zoo: Zoo, passes: list[str], words: str) -> None:
    adapt = [{"method": "lora", "target": "up", "r": 2}]
    with pytest.raises(SpecError, match=words):
        zoo.compiled("mlp", adapt, passes=passes)


def test_an_explicit_pipeline_is_run(zoo: Zoo) -> None:
    adapt = [{"method": "lora", "target": "up", "r": 2}]
    compiled = zoo.compiled("mlp", adapt, passes=["insert", {"factor": {"tokens": 64}}])
    assert compiled.plan.pipeline == ["insert-lora", "factor"]
    assert compiled.graph.stage == "factored"
    with pytest.raises(SpecError, match="unknown pass 'fodl'"):
        zoo.compiled("mlp", adapt, passes=["insert", "fodl"])
    with pytest.raises(SpecError, match="tokenz"):
        zoo.compiled("mlp", adapt, passes=["insert", {"factor": {"tokenz": 64}}])
    with pytest.raises(SpecError, match="insert"):
        zoo.compiled("mlp", adapt, passes=[])


# -- a user's pass that does something wrong ----------------------------------------------------------------


class Bad(Pass):
    """A pass of a user's own; `name` is set without registering it."""

    name = "bad"


class WrongShape(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        node.args = (node.args[0], next(n for n in graph.nodes if n.target == "mid.weight"))
        return True


class UnknownOperation(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(F.relu, (node,))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class RemovedWeight(Bad):
    def call(self, graph: Graph) -> bool:
        del graph.weights["up.weight"]
        return True


class OtherDtype(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(aten.to.dtype, (node, torch.float64))
        other.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class WrongWeight(Bad):
    def call(self, graph: Graph) -> bool:
        graph.weights["up.weight"] = Held(torch.zeros(3, 3))
        return True


class CallsAModule(Bad):
    def call(self, graph: Graph) -> bool:
        graph.module.add_module("extra", nn.Identity())
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_module("extra", (node,))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class Raises(Bad):
    def call(self, graph: Graph) -> bool:
        raise KeyError("mine")


class Unordered(Bad):
    def call(self, graph: Graph) -> bool:
        first, second = [n for n in graph.nodes if n.target is aten.linear.default][:2]
        first.args = (second, *first.args[1:])
        return True


class Forgets(Bad):
    """Leaves an inserted parameter unread."""

    takes = frozenset({"adapted"})

    def call(self, graph: Graph) -> bool:
        for node in graph.nodes:
            if node.target is aten.linear.default:
                node.args = (
                    node.args[0],
                    graph.parameter_node(graph.adaptations[0].site.parameter),
                    *node.args[2:],
                )
                return True
        return False


class Ensures(Bad):
    def call(self, graph: Graph) -> bool:
        return True

    def ensures(self, graph: Graph) -> str | None:
        return "what I promised does not hold"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (WrongShape, "mid.weight|linear"),
        (UnknownOperation, "relu"),
        (RemovedWeight, "up.weight"),
        (OtherDtype, "float64|records"),
        (WrongWeight, "up.weight"),
        (CallsAModule, "call_module|extra"),
        (Raises, "bad.*mine"),
        (Unordered, "bad|before"),
        (Ensures, "promised"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_pass_is_caught(zoo: Zoo, item: type[Pass], words: str) -> None:
    graph = zoo.graph("mlp")
    before = snapshot(graph)
    with pytest.raises(VerifyError, match=words) as caught:
        run(graph, [item()])
    assert str(caught.value).startswith("pass bad failed (after no other): ")
    assert snapshot(graph) == before


def test_a_failure_names_the_passes_and_shows_the_graph_around_the_node(zoo: Zoo) -> None:
    passes = [default("insert-lora", target="mid", r=2), default("gradient-checkpointing"), WrongShape()]
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), passes)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("pass bad failed (after insert-lora, gradient-checkpointing): %linear : ")
    assert "does not fit its operands: a and b must have same reduction dim" in first
    assert re.fullmatch(r"  in up, from families\.py:\d+", rest[0])
    assert rest[1] == "  the graph around %linear:"
    shown = rest[2:]
    marked = [line for line in shown if line.startswith("  > ")]
    assert len(marked) == 1
    assert "%linear = aten.linear.default(%x, %mid_weight)" in marked[0]
    assert shown.index(marked[0]) == 5
    assert len(shown) == 11
    assert all(line.startswith("    %") for line in shown if line not in marked)


def test_a_failure_without_a_node_shows_no_graph(zoo: Zoo) -> None:
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), [Ensures()])
    assert str(caught.value) == "pass bad failed (after no other): what I promised does not hold"
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), [Raises()])
    message = str(caught.value).splitlines()
    assert message[0] == "pass bad failed (after no other): KeyError: 'mine'"
    assert re.fullmatch(r'  at .*test_passes\.py:\d+    raise KeyError\("mine"\)', message[1])
    assert len(message) == 2


def test_a_node_that_a_pass_names_is_shown(zoo: Zoo) -> None:
    class Promises(Bad):
        def call(self, graph: Graph) -> bool:
            return False

        def ensures(self, graph: Graph) -> str | None:
            return "%relu is left"

    with pytest.raises(
        VerifyError, match=r"%relu is left\n  the graph around %relu:(\n.*)*\n  > %relu = aten.relu"
    ):
        run(zoo.graph("mlp"), [Promises()])


def test_an_error_for_the_person_is_as_the_pass_words_it(zoo: Zoo) -> None:
    class Told(Bad):
        def call(self, graph: Graph) -> bool:
            raise WeightError("it is not there")

    with pytest.raises(WeightError) as caught:
        run(zoo.graph("mlp"), [Told()])
    assert str(caught.value) == "it is not there"


def test_an_adapter_that_a_pass_forgot_is_caught(zoo: Zoo) -> None:
    graph = run(zoo.graph("mlp"), [default("insert-lora", target="up", r=2)])
    with pytest.raises(VerifyError, match="lora_"):
        run(graph, [Forgets()])


def test_a_wrong_fold_is_stopped_by_the_proof(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.rewriter.expression import Expression

    compiled = zoo.adapted("lora", "mlp")
    right = Expression.evaluate
    monkeypatch.setattr(Expression, "evaluate", lambda self: right(self) * (1 + 1e-3))
    with pytest.raises(adaptc.ProofError, match="fold"):
        compiled.fold()


def test_a_pass_of_ones_own_works_from_a_spec(zoo: Zoo) -> None:
    @dataclasses.dataclass(frozen=True)
    class ReluToSilu(Pass):
        """Relu becomes silu."""

        changes_results: ClassVar[bool] = True

        def call(self, graph: Graph) -> bool:
            found = [n for n in graph.nodes if n.target is aten.relu.default]
            for node in found:
                node.target = aten.silu.default
            return bool(found)

    graph_pass("relu-to-silu")(ReluToSilu)
    try:
        spec: dict[str, Any] = {
            "adapt": [{"method": "lora", "target": "up", "r": 2}],
            "passes": ["relu-to-silu", "insert"],
        }
        compiled = adaptc.compile(
            spec, model=randomise(Mlp()), example_inputs=(torch.randn(3, 16),), dynamic={"x": {0: "batch"}}
        )
        planned = zoo.compiled("mlp", spec["adapt"], passes=spec["passes"])
    finally:
        PASSES.forget("relu-to-silu")
    assert "aten.silu.default" in compiled.graph.operations
    assert [bool(record.change) for record in compiled.records if record.name == "relu-to-silu"] == [True]
    assert not any(record.change for record in planned.records), "a plan reads no weight"
    (note,) = [note for note in compiled.plan.notes if note.startswith("relu-to-silu")]
    assert re.fullmatch(r"relu-to-silu changes results: outputs differ by up to \S+ of the largest, .*", note)
    assert "aten.relu.default" not in compiled.graph.operations


# -- a user's pass that changes what the model computes ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scaled2(Bad):
    """The first layer gives something else, by a factor."""

    by: float = 2.0

    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(aten.mul.Tensor, (node, self.by))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class Meant(Scaled2):
    changes_results = True


class Flattens(Bad):
    """Gives back other shapes."""

    def call(self, graph: Graph) -> bool:
        output = next(n for n in graph.nodes if n.op == "output")
        (node,) = output.all_input_nodes
        with graph.module.graph.inserting_before(output):
            output.replace_input_with(node, graph.call(aten.flatten.using_ints, node, like=node))
        return True


def test_a_pass_that_changes_results_is_refused_by_how_much(zoo: Zoo) -> None:
    with pytest.raises(RefusedError) as caught:
        adaptc.run(zoo.graph("mlp"), [Scaled2()])
    assert re.fullmatch(
        r"bad changes what the model computes: outputs differ by up to \d\.\de[+-]0\d of the largest, and rounding "
        r"explains 6\.1e-05\n  write `changes_results: ClassVar\[bool\] = True` in Scaled2 if it is meant to; "
        r"see the graph before and after it with `--dump-graphs DIR`",
        str(caught.value),
    )
    adaptc.run(zoo.graph("mlp"), [Scaled2(by=1.0)])
    with pytest.raises(
        RefusedError, match=r"changes what the model computes: output 0 is \[\d+\], expected \[\d, 6\]"
    ):
        adaptc.run(zoo.graph("mlp"), [Flattens()])


def test_a_pass_that_loses_an_adapter_at_its_start_is_refused(zoo: Zoo) -> None:
    """B is zero: only random adapters show it."""

    class Loses(Bad):
        def call(self, graph: Graph) -> bool:
            node = next(n for n in graph.nodes if n.target is aten.mm.default)
            with graph.module.graph.inserting_after(node):
                other = graph.module.graph.call_function(aten.mul.Tensor, (node, 0.5))
            other.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
            return True

    with pytest.raises(RefusedError, match="bad changes what the model computes: outputs differ"):
        adaptc.run(zoo.graph("mlp"), [default("insert-lora", target="mid", r=2), Loses()])


def test_a_change_that_is_meant_is_recorded(zoo: Zoo) -> None:
    records = list[PassRecord]()
    run(zoo.graph("mlp"), [Meant(), Scaled2(by=1.0)], records, compare=comparison())
    assert [bool(record.change) for record in records] == [True, False]
    assert records[0].change.startswith("outputs differ by up to ")


def keeping(zoo: Zoo) -> dict[str, tuple[Graph, Any]]:
    """A graph on which each shipped pass that keeps results has something to do."""
    nf4 = run(zoo.graph("mlp"), [default("quantize-nf4", target="*")])
    chosen = dataclasses.replace(zoo.graph("mlp"), calibration_rows=[inputs("mlp", 9)])
    gptq = [default("quantize-gptq", target="re:up|down"), default("quantized-products")]
    int8 = [default("quantize-int8", target="*"), default("quantized-products")]
    adapted = at_stage(zoo, "adapted")
    return {
        "factor": (adapted, default("factor", tokens=64)),
        "fold": (adapted, default("fold")),
        "gradient-checkpointing": (adapted, default("gradient-checkpointing")),
        "dequantize": (nf4, default("dequantize")),
        "quantized-products": (nf4, default("quantized-products")),
        "plain-integers": (run(chosen, gptq), default("plain-integers")),
        "torch-kernels": (run(zoo.graph("mlp", "bfloat16"), int8), default("torch-kernels")),
        "evaluate": (run(adapted, [default("factor")]), Evaluate()),
        "functional": (run(zoo.graph("mlp"), [InPlace(), Evaluate()]), Functional()),
        "onnx-operations": (run(zoo.graph("mlp"), [Evaluate()]), OnnxOperations()),
        "onnx-casts": (run(zoo.graph("mlp"), [Evaluate(), OnnxOperations()]), Casts()),
    }


class InPlace(Bad):
    """Relu writes to its operand."""

    def call(self, graph: Graph) -> bool:
        for node in [n for n in graph.nodes if n.target is aten.relu.default]:
            node.target = aten.relu_.default
        return True


def test_shipped_passes_keep_results_unless_they_say_otherwise(zoo: Zoo) -> None:
    cases = keeping(zoo)
    quiet = {name for name, cls in load_passes().items() if not cls.changes_results}
    assert quiet <= set(cases), "a pass keeps results, it says: give it a graph to do so on"
    for name, (graph, item) in cases.items():
        assert item.name == name
        assert not item.changes_results
        before = randomised(graph)
        reference = Interpreter(before).on(batches(graph.inputs))
        prove(name, reference, Interpreter(run(before, [item])).on(reference.taken), tolerance(graph))
    assert {load_passes()[name].changes_results for name in INSERTS} == {True}
    assert RoundActivations.changes_results


# -- dead paths, aliases, layers that run twice ---------------------------------------------------------------


class Paths(nn.Module):
    """One live layer, one whose value is not used, one behind a detach, one behind an argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.detached, self.index = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dead(x)
        chosen = torch.nn.functional.one_hot(self.index(x).argmax(-1), 6).to(x.dtype)
        return self.live(x) + self.detached(x).detach() + chosen


@pytest.mark.parametrize("layer", ["dead", "detached", "index"])
def test_a_layer_that_cannot_be_trained_stops_the_compile(layer: str) -> None:
    def compile(target: Any) -> Any:
        return adaptc.compile(
            {"adapt": [{"method": "lora", "target": target, "r": 2}]},
            model=randomise(Paths()),
            example_inputs=(torch.randn(3, 6),),
            dynamic={"x": {0: "batch"}},
        )

    with pytest.raises(SpecError, match=layer):
        compile([layer])
    if layer != "dead":  # beside a good one too; a dead one is no site at all
        with pytest.raises(SpecError, match=layer):
            compile(["live", layer])
    assert compile(["live"]).module is not None


class Scaled(nn.Module):
    """A layer whose value is multiplied by zero: on a path, but without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.live(x) + 0.0 * self.dead(x)


def test_a_layer_without_effect_stops_the_products(tmp_path: Any) -> None:
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": ["live", "dead"], "r": 2}]},
        model=randomise(Scaled()),
        example_inputs=(torch.randn(3, 6),),
        dynamic={"x": {0: "batch"}},
    )
    with pytest.raises(adaptc.ProofError, match=r"dead\.lora_"):
        compiled.check_gradients()
    with pytest.raises(adaptc.ProofError, match=r"dead\.lora_"):
        compiled.emit("torch", tmp_path / "trainable")
    assert not (tmp_path / "trainable").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_folding_into_a_tied_head_is_refused_and_live_works(zoo: Zoo, method: str, tmp_path: Any) -> None:
    compiled = zoo.compiled("gpt2", [{"method": method, "target": "lm_head"}])
    assert any(
        ("cannot be folded" in note and "wte" in note) or "lm_head" in note for note in compiled.plan.notes
    )
    module = compiled.module.eval()
    assert module.lm_head.weight is module.transformer.wte.weight
    with torch.no_grad():
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
    tensors = inputs("gpt2", 2, 5)
    with torch.no_grad():
        got, base = outputs(module, tensors, ["logits"])["logits"], zoo.run_eager("gpt2", tensors)["logits"]
    differs(got, base)
    with pytest.raises(RefusedError, match="embedding"):
        compiled.fold()
    with pytest.raises(AdaptcError):
        compiled.emit("onnx", tmp_path / "model.onnx", adapters="folded")
    assert not (tmp_path / "model.onnx").exists()
    # by hand: the head alone is changed, the embedding is not
    with torch.no_grad():
        twin = zoo.fresh("gpt2")
        hidden = twin.transformer(**tensors, use_cache=False).last_hidden_state
        W, t = twin.lm_head.weight, {n.split(".")[1]: p for n, p in trained.items()}
        match method:
            case "lora":
                W = W + t["lora_B"] @ t["lora_A"]
            case "dora":
                V = W + t["lora_B"] @ t["lora_A"]
                W = (t["lora_magnitude_vector"] / V.norm(dim=1))[:, None] * V
            case "ia3":
                W = t["ia3_l"] * W
        close(got, hidden @ W.t())


class Twice(nn.Module):
    """One layer run twice, and the same layer under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.layer(torch.tanh(self.layer(x)))))))


def adapt_twice(model: nn.Module, method: str) -> Any:
    return adaptc.compile(
        {"adapt": [{"method": method, "target": "layer"}]},
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_module_with_two_names_is_adapted_under_the_one_written(method: str) -> None:
    model = randomise(Twice())
    module = adapt_twice(model, method).module.eval()
    t = {n.split(".")[1]: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in perturbed(t).items():
            t[key].copy_(value)
        x, W, b = torch.randn(5, 8), model.layer.weight, model.layer.bias
        W1, b1 = (
            (W + t["lora_B"] @ t["lora_A"], b) if method == "lora" else (t["ia3_l"] * W, t["ia3_l"][:, 0] * b)
        )
        h = torch.tanh(F.linear(torch.tanh(F.linear(x, W1, b1)), W1, b1))
        want = model.last(torch.tanh(F.linear(h, W, b)))
        close(module(x), want)
        differs(model(x), want)


def test_a_module_with_two_names_is_refused_by_the_name_written() -> None:
    with pytest.raises(RefusedError, match=r"\blayer\.weight\b"):
        adapt_twice(randomise(Twice()), "lora").fold()


class Rerun(nn.Module):
    """One layer run three times under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.last(x)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "full"])
def test_a_layer_run_three_times_is_one_site(method: str) -> None:
    model = randomise(Rerun())
    compiled = adaptc.compile(
        {
            "adapt": [
                {"method": method, "target": ["layer", "last"], **({"r": 3} if method[1:] == "ora" else {})}
            ]
        },
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )
    assert len({a.site.module for a in compiled.graph.adaptations}) == 2
    module = compiled.module.eval()
    with torch.no_grad():
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
    x = torch.randn(5, 8)
    folded = compiled.fold()
    twin = Rerun()
    twin.load_state_dict(folded.state_dict())
    with torch.no_grad():
        close(folded(x), module(x))
        close(twin(x), module(x))  # the eager model with the folded weights
        differs(model(x), module(x))


class TwoNames(nn.Module):
    """The same tensor in two layers, both adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("target", [["one"], ["two"], ["one", "two"]])
def test_two_layers_with_one_tensor_never_share_a_fold(target: list[str]) -> None:
    model = randomise(TwoNames())
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": target, "r": 2}]},
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )
    module = compiled.module.eval()
    assert {a.site.module for a in compiled.graph.adaptations} == set(target)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
        x = torch.randn(4, 8)
        W = {}
        for name in ("one", "two"):
            W[name] = model.one.weight
            if name in target:
                state = module.state_dict()
                B, A = state[f"{name}.lora_B.default.weight"], state[f"{name}.lora_A.default.weight"]
                W[name] = W[name] + 8.0 / 2 * B @ A
        want = F.linear(torch.tanh(F.linear(x, W["one"], model.one.bias)), W["two"], model.two.bias)
        close(module(x), want)
    with pytest.raises(RefusedError):
        compiled.fold()


def test_folding_leaves_the_users_model_alone() -> None:
    model = randomise(Mlp()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "*", "r": 2}]},
        model=model,
        example_inputs=(torch.randn(3, 16),),
        dynamic={"x": {0: "batch"}},
    )
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    folded = compiled.fold()
    assert not torch.equal(folded.up.weight, before["up.weight"])
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert not changed
