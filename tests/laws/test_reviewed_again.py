"""What a second review found wrong once, in proofs and in models that are spelled in another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler import reference
from adaptc.compiler.proof import BatchRunner, batches, prove
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.ir.tie_breaks import TieBreaks
from tests.families import perturb

LORA = {"method": "lora", "r": 2}


class Calls(nn.Module):
    """Some layers, and what is computed with them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def compiled(model: nn.Module, adapt: list[dict[str, Any]], x: torch.Tensor) -> adaptc.Compiled:
    return adaptc.compile({"adapt": adapt}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch"}})


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 512 * torch.finfo(a.dtype).eps * b.abs().max())


def of(module: nn.Module, name: str) -> torch.Tensor:
    return dict(module.named_parameters())[name]


# what is adapted


def test_untie_takes_the_tensor_that_is_meant_out_of_several_in_one_operation() -> None:
    def stacked(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.cat([m.a.weight, m.b.weight])).tanh()

    model, x = Calls(stacked, a=nn.Linear(6, 4), b=nn.Linear(6, 4)), torch.randn(3, 6)
    made = compiled(
        model, [{"method": "full", "target": "b", "parameters": ["weight"], "on_alias": "untie"}], x
    )
    perturb(made.module)
    weight = torch.cat([model.get_parameter("a.weight"), of(made.module, "b.full.default.weight")])
    assert near(made.module.eval()(x), F.linear(x, weight).tanh())
    assert near(made.fold()(x), F.linear(x, weight).tanh())


@pytest.mark.parametrize("change", ["double().float()", "to_empty", "load_state_dict"])
def test_products_follow_a_module_whose_tensors_are_replaced(change: str) -> None:
    def normed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.down(torch.relu(m.norm(m.up(x))))

    layers = {"up": nn.Linear(6, 8), "norm": nn.BatchNorm1d(8), "down": nn.Linear(8, 3)}
    made = compiled(Calls(normed, **layers), [{**LORA, "target": "up"}], torch.randn(4, 6))
    module = made.module
    if change == "double().float()":
        module.double().float()
    elif change == "to_empty":
        module._apply(torch.clone)
    else:
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    perturb(module)
    module.train()
    for _ in range(5):
        module(3 + torch.randn(16, 6))
    x = torch.randn(5, 6)
    assert near(made.fold()(x), module.eval()(x))


SPELLED: dict[str, tuple[tuple[int, ...], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "x @ W.T": ((4, 6), lambda m, x: x @ m.W.T),
    "x @ W.mT": ((4, 6), lambda m, x: x @ m.W.mT),
    "einsum without an arrow": ((6, 4), lambda m, x: torch.einsum("bi,io", x, m.W)),
    "permute(0, 1)": ((6, 6), lambda m, x: F.linear(x, m.W.permute(0, 1))),
    "transpose(0, 0)": ((4, 6), lambda m, x: F.linear(x, m.W.transpose(0, 0))),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_parameter_is_adapted_however_it_is_turned(name: str, method: str, tmp_path: Path) -> None:
    shape, forward = SPELLED[name]
    model, x = Calls(lambda m, x: forward(m, x).tanh(), W=nn.Parameter(torch.randn(shape))), torch.randn(5, 6)
    rank = {} if method == "ia3" else {"r": 2}
    made = compiled(model, [{"method": method, "target": "W", **rank}], x)
    perturb(made.module)
    want = adaptc.bind(made.graph).eval()(x).detach()
    assert not near(want, model(x))
    made.emit("onnx", tmp_path / "m.onnx")
    for got in (made.module.eval()(x), made.fold()(x), onnx_runner(tmp_path / "m.onnx")({"x": x})[0]):
        assert near(got, want)


def test_a_tensor_that_two_methods_change_in_different_places_is_refused() -> None:
    def tied(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(m.e(x).mean(1), m.e.weight)

    model, x = Calls(tied, e=nn.Embedding(9, 6)), torch.randint(0, 9, (3, 5))
    adapt = [{"method": "full", "target": "e"}, {**LORA, "target": "e"}]
    made = compiled(model, adapt, x)
    perturb(made.module)
    with pytest.raises(adaptc.RefusedError, match="the same tensor is also used by"):
        made.fold()
    live = compiled(model, [entry | {"on_alias": "live"} for entry in adapt], x)
    perturb(live.module)
    assert near(live.fold()(x), live.module.eval()(x))


def test_a_model_that_is_random_in_evaluation_is_told_so() -> None:
    model = Calls(lambda m, x: F.dropout(m.l(x), 0.5, True), l=nn.Linear(6, 4))
    with pytest.raises(TraceError, match=r"in evaluation mode gave different outputs(?s:.*)self\.training"):
        compiled(model, [{**LORA, "target": "l"}], torch.randn(3, 6))


def test_a_row_of_zeros_is_no_nan_in_dora() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer.weight.data[1] = 0.0
    made = compiled(Calls(lambda m, x: m.l(x), l=layer), [{"method": "dora", "target": "l", "r": 2}], x)
    assert near(made.module.eval()(x), layer(x))
    made.check_gradients()


def test_a_layer_before_a_fourier_transform_is_trained() -> None:
    model, x = Calls(lambda m, x: torch.fft.fft(m.l(x)).real, l=nn.Linear(6, 8)), torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    made.check_gradients()


def test_a_batch_norm_that_two_branches_share_follows_the_mode() -> None:
    model = Calls(
        lambda m, x: m.norm(m.l(x)) - m.norm(m.l(2 * x)).tanh(), l=nn.Linear(6, 8), norm=nn.BatchNorm1d(8)
    )
    x = torch.randn(4, 6)
    module = compiled(model, [{**LORA, "target": "l"}], x).module.train()
    model.train()
    assert near(module(x), model(x))
    assert near(module.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))
    assert int(module.get_buffer("norm.num_batches_tracked")) == 2


def test_a_parameter_without_numbers_is_folded() -> None:
    model = Calls(lambda m, x: m.l(x) + m.none.sum(), l=nn.Linear(6, 4), none=nn.Parameter(torch.empty(0, 4)))
    x = torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    assert near(made.fold()(x), model(x))


def test_a_compile_leaves_the_parameters_that_forward_writes_to() -> None:
    table = nn.Embedding(9, 6, max_norm=0.1)
    before, x = table.weight.detach().clone(), torch.randint(0, 9, (3, 5))
    model = Calls(lambda m, x: m.l(m.e(x)), e=table, l=nn.Linear(6, 4))
    compiled(model, [{**LORA, "target": "l"}], x).folded_graph()
    assert torch.equal(table.weight, before)


# inputs and outputs


def test_a_size_among_the_outputs_does_not_reach_onnx(tmp_path: Path) -> None:
    model, x = Calls(lambda m, x: (m.l(x), x.shape[0]), l=nn.Linear(6, 4)), torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    made.emit("onnx", tmp_path / "m.onnx")
    (found,) = onnx_runner(tmp_path / "m.onnx")({"x": x})
    assert near(found, model(x)[0])


def test_labels_that_make_more_than_a_loss_stay(tmp_path: Path) -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.table = nn.Linear(6, 4), nn.Linear(6, 4), nn.Embedding(5, 6)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            image = self.f(x + self.table(labels))
            return {"loss": image.square().mean(), "image": image, "features": self.g(x)}

    model, feeds = Generator(), {"x": torch.randn(3, 6), "labels": torch.tensor([1, 4, 2])}
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "f"}]},
        model=model,
        example_inputs=feeds,
        dynamic={"x": {0: "batch"}, "labels": {0: "batch"}},
    )
    made.emit("onnx", tmp_path / "m.onnx")
    found = onnx_runner(tmp_path / "m.onnx")(feeds)
    assert [near(a, model(**feeds)[name]) for a, name in zip(found, ("image", "features"), strict=True)] == [
        True
    ] * 2


def test_both_senses_of_a_boolean_input_are_proved() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return torch.where(keep[:, None], self.yes(x), self.no(x))

    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "no"}]},
        model=Either(),
        example_inputs=(torch.randn(3, 6), torch.tensor([True, False, True])),
        dynamic={"x": {0: "batch"}, "keep": {0: "batch"}},
    )
    made.check_gradients()


def test_integers_below_zero_are_inputs() -> None:
    model = Calls(lambda m, x: m.l(x.float().tanh()), l=nn.Linear(6, 4))
    compiled(model, [{**LORA, "target": "l"}], torch.arange(-9, 9).reshape(3, 6)).check_gradients()


def test_a_query_that_a_float_mask_keeps_from_all_keys_is_zero(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.l = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.l(self.a(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0])

    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.long)
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "l"}]},
        model=Attention(),
        example_inputs=(x, mask),
        dynamic={"x": {0: "batch"}, "mask": {0: "batch"}},
    )
    made.emit("onnx", tmp_path / "m.onnx")
    mask[0] = 0
    want = made.module.eval()(x, mask)
    assert torch.isfinite(want).all()
    assert near(onnx_runner(tmp_path / "m.onnx")({"x": x, "mask": mask})[0], want.detach())


# proofs


def against(a: torch.Tensor, b: torch.Tensor) -> Any:
    inputs = [InputSpec("x", "float32", ("batch", 2))]
    drawn = batches(inputs)
    return prove(
        "test", BatchRunner(lambda batch: [a]).on(drawn), BatchRunner(lambda batch: [b]).on(drawn), 1e-4
    )


LOWEST = torch.finfo(torch.float32).min
APART = {
    "inf and nan": ([1.0, math.inf], [1.0, math.nan]),
    "inf and -inf": ([1.0, math.inf], [1.0, -math.inf]),
    "nan in both": ([1.0, math.nan], [1.0, math.nan]),
    "beside a mask": ([LOWEST, 1.0, 2.0], [LOWEST, 100.0, -2.0]),
    "a mask that is gone": ([LOWEST, 1.0, 2.0], [0.0, 1.0, 2.0]),
    "a number and a whole one": ([1.0, 2.0], [1, 2]),
    "imaginary parts": ([1 + 1j], [1 - 5j]),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_apart_is_no_proof(name: str) -> None:
    a, b = (torch.tensor(values) for values in APART[name])
    with pytest.raises(adaptc.ProofError):
        against(a, b)


@pytest.mark.parametrize(
    "values", [[LOWEST, 1.0, 2.0], [math.inf, 1.0], [1 + 1j], [3, 4], [True, False], [0.0]]
)
def test_what_is_equal_is_one(values: list[Any]) -> None:
    assert against(torch.tensor(values), torch.tensor(values)).relative == 0.0


def test_a_masked_router_makes_its_own_choices() -> None:
    graph = adaptc.trace(
        Calls(lambda m, x: torch.topk(m.l(x), 1).values, l=nn.Linear(6, 4)),
        (torch.randn(3, 6),),
        dynamic={"x": {0: "batch"}},
    )
    node = next(n for n in graph.nodes if "topk" in str(n.target))
    scores = torch.tensor([[1.0, 5.0, -math.inf, 2.0]])
    other = TieBreaks(others=[torch.tensor([[0]])], near=0.1)
    assert other.make(node, scores, torch.topk(scores, 1))[1].tolist() == [[1]]
    assert other.flipped == 0


def test_recorded_values_tell_nan_from_zero() -> None:
    kept = reference._sample(torch.tensor([math.nan, 1.0]))
    assert reference._error(torch.tensor([math.nan, 1.0]), kept, "") == 0.0
    assert reference._error(torch.tensor([0.0, 1.0]), kept, "") == math.inf
    kept = reference._sample(torch.tensor([LOWEST, 1.0, 2.0]))
    assert reference._error(torch.tensor([LOWEST, 1.0, -2.0]), kept, "") == 2.0


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 2**24 + 4, 2**24 + 8])
def test_recorded_places_are_within(count: int) -> None:
    places = reference._places(count)
    assert int(places[0]) == 0
    assert int(places[-1]) == count - 1
    assert len(places) == min(count, 64)
