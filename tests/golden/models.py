"""Models of a few operations, small enough for the text of a graph to be read at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.compiler.base import make_base
from adaptc.ir.graph import Graph
from adaptc.spec.spec import load
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base
from tests.families import randomise


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TwoLayers(nn.Module):
    """Two linear layers, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.first(x))))


class Normed(nn.Module):
    """A norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class FeedForward(nn.Module):
    """A sub-layer and its residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))


class Attention(nn.Module):
    """One attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Writer(nn.Module):
    """Causal attention of one head between a norm and a sum, from token ids to words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(20, 16), nn.Parameter(torch.ones(16))
        self.q, self.k, self.v, self.head = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.norm(x + self.attend(self.norm(x)))
        return self.head(x)

    def norm(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class ByHand(Writer):
    """The same attention, written out: scores are scaled, capped and masked."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.tanh(q @ k.transpose(2, 3) * 0.25 / 30.0) * 30.0
        later = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        shares = torch.softmax(scores + later, -1, dtype=torch.float32).to(q.dtype)
        return (shares @ v).transpose(1, 2).flatten(2)


class Translator(nn.Module):
    """Two tables of words: those that are written attend to each other, and to those that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.written = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.k, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        source, x = self.read(input_ids)[:, None], self.written(decoder_input_ids)[:, None]
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, self.k(source), self.v(source))[:, 0]


class Words(nn.Module):
    """Embeddings, of which padding counts for nothing, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) * attention_mask[..., None])


class Image(nn.Module):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Experts(nn.Module):
    """Two experts, each of which multiplies its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.empty(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.experts)


class Fused(nn.Module):
    """One projection in place of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).split([8, 4], -1)
        return first.tanh().sum(-1) + second.sum(-1)


class Row(nn.Module):
    """Several layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class InPlace(nn.Module):
    """An operation that writes to its operand, and one that casts it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu_()
        return y / y.shape[-1] + y.argmax(-1, keepdim=True)


class Rare(nn.Module):
    """An operation that ONNX has no form for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softshrink(x)


BATCH, SEQUENCE = {0: "batch"}, {0: "batch", 1: "seq"}
EXAMPLES: dict[type[nn.Module], tuple[Mapping[str, Tensor], Mapping[int, str]]] = {
    **{model: ({"x": torch.zeros(3, 8)}, BATCH) for model in (Layer, TwoLayers, Normed, Row, InPlace, Rare)},
    **{model: ({"x": torch.zeros(3, 5, 8)}, SEQUENCE) for model in (FeedForward, Attention, Fused)},
    Words: (
        {name: torch.ones(3, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")},
        SEQUENCE,
    ),
    Image: ({"x": torch.zeros(2, 3, 8, 8)}, BATCH),
    Experts: ({"x": torch.zeros(2, 5, 8)}, {1: "rows"}),
    Writer: ({"input_ids": torch.ones(2, 17, dtype=torch.int64)}, {0: "batch", 1: "seq"}),
    ByHand: ({"input_ids": torch.ones(2, 17, dtype=torch.int64)}, {0: "batch", 1: "seq"}),
}
"""Inputs that a model is traced with, and the axes of each that have other sizes."""


def translating() -> Graph:
    """The graph of an encoder and a decoder, whose texts have lengths of their own."""
    inputs = {
        name: f"int64[batch, {dim}]" for name, dim in (("input_ids", "seq"), ("decoder_input_ids", "new"))
    }
    return trace_base(make_base(load({"inputs": inputs}), randomise(Translator()).eval()))


@cache
def traced(model: type[nn.Module], dtype: Any = torch.float32) -> Graph:
    """The graph of a model, not to be changed."""
    inputs, axes = EXAMPLES[model]
    module = randomise(model()).to(dtype).eval()
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return trace_base(from_examples(module, inputs, dict.fromkeys(inputs, axes)))
