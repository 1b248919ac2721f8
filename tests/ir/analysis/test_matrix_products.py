"""One table of matrix products: what `adaptc plan` counts is what torch counts on the eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import adaptc
from adaptc.ir.cost import BATCH, LENGTH, flops
from adaptc.ir.graph import Graph
from tests.families import Zoo


def counted(model: nn.Module, *inputs: Tensor, **named: Tensor) -> int:
    """What torch counts while the model runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **named)
    return counter.get_total_flops()


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "conv1d-same": (nn.Conv1d(4, 6, 3, padding="same"), (4, 11)),
    "conv2d-groups": (nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), (4, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2, stride=2), (4, 6, 5, 4)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=1), (4, 5, 7)),
    "transposed2d-groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (4, 5, 7)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1), (4, 6, 5, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operations_of_convolutions(name: str) -> None:
    model, shape = CONVOLUTIONS[name]
    graph = adaptc.trace(model.eval(), (torch.randn(2, *shape),), {"input": {0: "batch"}})
    assert flops(graph) == counted(model, torch.randn(BATCH, *shape)) > 0


class Multiplies(nn.Module):
    """One matrix product with a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.W = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.W)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (F.linear, (6, 4)),
    "linear-with-bias": (lambda x, W: F.linear(x, W, W[:, 0]), (6, 4)),
    "matmul": (torch.matmul, (4, 6)),
    "matmul-left": (lambda x, W: W @ x.transpose(1, 2), (6, 4)),
    "mm": (lambda x, W: torch.mm(x.flatten(0, 1), W), (4, 6)),
    "addmm": (lambda x, W: torch.addmm(W[0], x.flatten(0, 1), W), (4, 6)),
    "bmm": (lambda x, W: torch.bmm(x.transpose(0, 1), W), (10, 4, 6)),
    "baddbmm": (lambda x, W: torch.baddbmm(W[:, :1], x.transpose(0, 1), W), (10, 4, 6)),
    "convolution": (lambda x, W: torch.convolution(x, W, None, [1], [0], [1], False, [0], 1), (6, 10, 3)),
    "convolution-transposed": (
        lambda x, W: torch.convolution(x, W, None, [2], [0], [1], True, [0], 1),
        (10, 6, 3),
    ),
    "einsum": (lambda x, W: torch.einsum("bsi,hoi->bsho", x, W), (3, 2, 4)),
    "einsum-ellipsis": (lambda x, W: torch.einsum("...i,oi->...o", x, W), (6, 4)),
    "einsum-batched": (lambda x, W: torch.einsum("bsi,sio->bso", x, W), (10, 4, 6)),
    "einsum-implicit": (lambda x, W: torch.einsum("bsi,io", x, W), (4, 6)),
    "attention": (lambda x, W: F.scaled_dot_product_attention(x @ W, x @ W, x), (4, 6)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_operations_of_spellings(name: str) -> None:
    function, shape = SPELLINGS[name]
    model = Multiplies(function, *shape)
    graph = adaptc.trace(model.eval(), (torch.randn(2, 10, 4),), {"x": {0: "batch"}})
    x = torch.randn(BATCH, 10, 4)
    if name != "attention":
        assert flops(graph) == counted(model, x) > 0
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others are not all counted
        assert flops(graph) == counted(model, x) > 0


RECURRENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "lstm-projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {"bias": False, "num_layers": 2}),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_operations_of_recurrent_layers(name: str) -> None:
    kind, options = RECURRENT[name]
    model = kind(4, 6, batch_first=True, **options).eval()
    graph = adaptc.trace(model, (torch.randn(2, 5, 4),), {"input": {0: "batch", 1: "time"}})
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert flops(graph) == 2 * BATCH * LENGTH * matrices


TOKENS, EXPERTS, TOP, WIDTH, OUT = 10, 4, 2, 8, 16


class Chosen(nn.Module):
    """Experts chosen by a router: the matrices of each token's are gathered, or tokens are sorted by theirs."""

    def __init__(self, gathered: bool) -> None:
        super().__init__()
        self.gathered, self.router = gathered, nn.Linear(WIDTH, EXPERTS, bias=False)
        self.W = nn.Parameter(torch.randn(EXPERTS, OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(TOP)[1].flatten()
        tokens = x.repeat_interleave(TOP, 0)
        if self.gathered:
            return torch.bmm(self.W[chosen], tokens.unsqueeze(-1)).squeeze(-1)
        order = chosen.argsort()
        ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
        return torch._grouped_mm(tokens[order], self.W.transpose(-2, -1), offs=ends)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "grouped"])
def test_operations_of_experts(gathered: bool) -> None:
    model = Chosen(gathered).bfloat16()  # what torch groups
    graph = adaptc.trace(model.eval(), (torch.randn(TOKENS, WIDTH).bfloat16(),), {})
    assert ("aten.bmm.default" if gathered else "aten._grouped_mm.default") in graph.operations
    assert flops(graph) == 2 * TOKENS * WIDTH * EXPERTS + 2 * TOKENS * TOP * WIDTH * OUT


@pytest.mark.slow
def test_operations_of_mixtral(zoo: Zoo) -> None:
    """Held against torch's count of the eager model, whose experts are a loop of linear layers."""
    graph: Graph = zoo.graph("mixtral")
    compiled = zoo.compiled("mixtral", [{"method": "lora", "target": "*.q_proj", "r": 1}])
    cost = compiled.plan.budget
    model: Any = zoo.fresh("mixtral")
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    assert cost.base_flops == counted(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    config = model.config
    one = 2 * LENGTH * config.num_experts_per_tok * config.hidden_size * config.intermediate_size
    experts = [n for n in graph.nodes if "grouped_mm" in str(n.target)]
    assert len(experts) == 2 * config.num_hidden_layers
    assert cost.base_flops > 3 * one * config.num_hidden_layers
