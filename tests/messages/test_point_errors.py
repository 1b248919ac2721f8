"""What is said where the place for an adapter, a prefix or a prompt cannot be found, or makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.families import Zoo, perturb


class Blend(nn.Module):
    """An attention whose result is blended in, not added, and a feed-forward that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.wide, self.narrow = (
            nn.Linear(8, 8) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1)
        x = torch.lerp(x, self.out(weights @ self.value(x)), 0.5)
        return x + self.narrow(torch.relu(self.wide(x)))


class Slopes(nn.Module):
    """Attention with a bias that grows with the distance of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        scores = scores - 0.5 * (places[None] - places[:, None]).abs().to(x.dtype)
        return x + scores.softmax(-1) @ self.value(x)


class Powers(Slopes):
    """Attention whose scores meet the number of tokens in a way that nobody foresaw."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        scores = torch.pow(scores.exp(), x.mean(-1)[:, None])
        return x + scores.softmax(-1) @ self.value(x)


class Looks(nn.Module):
    """Tokens, and two inputs beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.out(self.words(ids) * weights[..., None])


X = torch.randn(2, 5, 8)


def words(
    model: nn.Module, entry: dict[str, Any], given: tuple[Tensor, ...] = (X,), length: bool = True
) -> str:
    """The error of a compile, in words."""
    names = ["ids", "weights"] if len(given) == 2 else ["x"]
    axes: dict[int, str] = {0: "batch", 1: "seq"} if length else {0: "batch"}
    with pytest.raises(adaptc.SpecError) as caught:
        adaptc.compile(
            {"adapt": [entry]}, model=model, example_inputs=given, dynamic=dict.fromkeys(names, axes)
        )
    return str(caught.value)


def bottleneck(**options: Any) -> dict[str, Any]:
    return {"method": "bottleneck", "r": 4, **options}


def test_a_layer_without_a_residual_sum_is_no_silent_skip() -> None:
    found = words(Blend(), bottleneck())
    assert (
        "adapt.0.target: bottleneck: no residual sum was found downstream of out, at node linear_3" in found
    )
    assert "from test_point_errors.py:" in found
    assert "name the point: target: {node: linear_3}, or leave it out with `exclude`" in found


@pytest.mark.parametrize(
    "entry",
    [bottleneck(exclude=["out"]), bottleneck(target={"node": "linear_3"}), bottleneck(target="narrow")],
)
def test_and_its_mend_mends_it(entry: dict[str, Any]) -> None:
    compiled = adaptc.compile(
        {"adapt": [entry]}, model=Blend(), example_inputs=(X,), dynamic={"x": {0: "batch", 1: "seq"}}
    )
    (adaptation,) = compiled.graph.adaptations
    module = compiled.module.eval()
    with torch.no_grad():
        before = module(X)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
        assert not torch.allclose(module(X), before), adaptation.site


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"node": "linaer_3"}, "node 'linaer_3': no operation gives such a value; near: linear_3"),
        ({"node": "linear_3", "input": "nothing"}, "no operation gives such a value"),
        ({"node": "x"}, "node 'x': no operation gives such a value; near: "),
        ({"role": "embedding"}, "role 'embedding': the layers here are feed_forward.out"),
        ("nowhere", "matches no sub-layer of tests.messages.test_point_errors.Blend"),
    ],
)
def test_a_place_that_is_not_there(target: Any, said: str) -> None:
    assert said in words(Blend(), bottleneck(target=target))


def test_a_parallel_adapter_needs_an_input_of_the_same_shape() -> None:
    parallel = {"method": "parallel", "r": 4}
    found = words(Blend(), {**parallel, "target": {"node": "linear_3"}})
    assert "it reads the sub-layer's input: name that too, target: {node: ..., input: ...}" in found
    found = words(Blend(), {**parallel, "target": {"node": "linear_3", "input": "softmax"}})
    assert "its input softmax is" in found
    assert "its output linear_3" in found
    found = words(Blend(), {**parallel, "target": {"node": "linear_3", "input": "linear_5"}})
    assert "its input linear_5 is computed after linear_3" in found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "nosuch"}, "has no activation 'nosuch': such are relu, gelu, silu, tanh"),
        ({"activation": "gleu"}, "has no activation 'gleu'; did you mean 'gelu'?"),
        ({"activation": "linear"}, "has no activation 'linear'"),
        ({"r": 9}, "r=9 is wider than the 8 features here"),
        ({"method": "compacter", "phm_dim": 3}, "phm_dim=3 does not divide 4"),
        ({"method": "prompt"}, "an input is an integer input (batch, seq) that is looked up in an embedding"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    entry = bottleneck(target="narrow") | options
    if entry["method"] == "prompt":
        entry = {"method": "prompt"}
    assert said in words(Blend(), entry)


def test_an_attention_that_is_not_understood() -> None:
    found = words(Slopes(), {"method": "prefix"})
    assert "it adds a bias that is computed from positions, and not looked up in a table" in found
    assert "from test_point_errors.py:" in found
    assert "leave it out with `exclude`" in found
    found = words(Powers(), {"method": "p-tuning-v2"})
    assert "is not understood: pow is not a known operation on scores" in found


def test_where_there_is_no_attention() -> None:
    found = words(Looks(), {"method": "prefix"}, (torch.randint(20, (2, 5)), torch.randn(2, 5)))
    assert "an attention is scaled_dot_product_attention, or two products of activations" in found


def test_virtual_tokens_beside_an_input_of_unknown_meaning() -> None:
    found = words(Looks(), {"method": "prompt"}, (torch.randint(20, (2, 5)), torch.randn(2, 5)))
    assert "it is not known what the input 'weights' is for a virtual token" in found
    assert "inputs of that length are known by their names" in found


def test_a_mask_of_numbers_may_mean_either() -> None:
    class Masked(Looks):
        def forward(self, ids: Tensor, weights_mask: Tensor) -> Tensor:
            return super().forward(ids, weights_mask)

    axes = {key: {0: "batch", 1: "seq"} for key in ("ids", "weights_mask")}
    given = (torch.randint(20, (2, 5)), torch.ones(2, 5))
    with pytest.raises(adaptc.SpecError, match="not known what the input 'weights_mask' is"):
        adaptc.compile({"adapt": [{"method": "prompt"}]}, model=Masked(), example_inputs=given, dynamic=axes)


def test_an_output_that_is_no_row_of_tokens() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids)[:, ::2]

    with pytest.raises(adaptc.SpecError, match="an output cannot be cut to the real tokens"):
        adaptc.compile(
            {"adapt": [{"method": "prompt"}]},
            model=Halved(),
            example_inputs=(torch.randint(20, (2, 6)),),
            dynamic={"ids": {0: "batch", 1: "seq"}},
        )


def test_virtual_tokens_in_a_sequence_of_fixed_length() -> None:
    given = (torch.randint(20, (2, 5)), torch.randn(2, 5))
    found = words(Looks(), {"method": "prompt"}, given, length=False)
    assert "the length of ids is fixed, so nothing can be put in front" in found
    assert "ids: int64[batch, seq]" in found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positions": [3, 1]}, "in rising order, each once, got [3, 1]"),
        ({"positions": [1, 2]}, "expected 20 positions from 0 on in rising order"),
        ({"init": "TEXT"}, "TEXT starts from init_text, which is not given"),
        ({"init": "TEXT", "init_text": "good"}, "starts from words, and"),
    ],
)
def test_prompts_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    given = (torch.randint(20, (2, 5)), torch.randn(2, 5))
    assert said in words(Looks(), {"method": "prompt", **options}, given)


def test_what_stays_has_no_place_in_a_hugging_face_checkpoint(zoo: Zoo) -> None:
    emit = [{"format": "hf", "path": "merged"}]
    with pytest.raises(adaptc.SpecError, match="bottleneck cannot be folded into weights") as caught:
        zoo.compiled("bert", [bottleneck()], emit=emit)
    assert "emit.0.format" in str(caught.value)
    assert "emit onnx or torch; or emit the adapter alone, as peft" in str(caught.value)
    with pytest.raises(adaptc.AdaptcError, match="bottleneck cannot be folded into weights"):
        zoo.compiled("bert", [bottleneck()]).emit("hf", "/nowhere/merged")


def test_a_node_that_is_an_output_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compiled = adaptc.compile(
        {
            "adapt": [
                bottleneck(target={"node": "linear_1"}),
                bottleneck(target={"node": "linear_1"}, name="b"),
            ]
        },
        model=model,
        example_inputs=(X[:, 0],),
        dynamic={"input": {0: "batch"}},
    )
    assert [str(a.site.module) for a in compiled.graph.adaptations] == ["2", "2"]
    module = compiled.module.eval()
    perturb(module, seed=1)
    theta = dict(module.named_parameters())
    h = model(X[:, 0])
    for name in ("default", "b"):
        down, up = (theta[f"2.bottleneck_{side}.{name}.weight"] for side in ("down", "up"))
        biases = [theta[f"2.bottleneck_{side}.{name}.bias"] for side in ("down", "up")]
        h = h + torch.relu(h @ down.T + biases[0]) @ up.T + biases[1]
    assert torch.allclose(module(X[:, 0]), h, atol=1e-5)


def test_two_prompts_of_one_name_would_be_saved_as_one() -> None:
    given = (torch.randint(20, (2, 5)), torch.ones(2, 5, dtype=torch.int64))

    class Masked(Looks):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, mask.float())

    with pytest.raises(adaptc.SpecError, match="puts an adapter named 'default' on words already"):
        adaptc.compile(
            {"adapt": [{"method": "prompt"}, {"method": "p-tuning"}]},
            model=Masked(),
            example_inputs=given,
            dynamic={key: {0: "batch", 1: "seq"} for key in ("ids", "mask")},
        )
