"""Decoders as people write them by hand, and models in which tokens meet outside causal attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WORDS, WIDTH, HEADS, LONGEST = 50, 24, 2, 128


class Decoder(nn.Module):
    """Layers of attention that subclasses mask in their own way.

    Args:
        mix: called with the hidden values before each attention: what else happens to the tokens.
        depth: how many layers.
    """

    def __init__(
        self,
        mix: Callable[[Any, torch.Tensor], torch.Tensor] = lambda _, x: x,
        depth: int = 2,
        **layers: nn.Module,
    ) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(WORDS, WIDTH), mix
        self.place = nn.Embedding(LONGEST, WIDTH)
        self.packed = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, WORDS)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.place.weight[: input_ids.shape[1]]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.positions(input_ids)
        for packed, out in zip(self.packed, self.out, strict=True):
            q, k, v = packed(self.mix(self, x)).chunk(3, -1)
            heads = [t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in (q, k, v)]
            x = x + out(self.attend(*heads).transpose(1, 2).flatten(2))
        return self.head(x)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class BufferMask(Decoder):
    """nanoGPT: a triangle stored for the longest text, cut to the tokens."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.register_buffer("triangle", torch.ones(LONGEST, LONGEST).tril()[None, None])

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.place(torch.arange(input_ids.shape[1]))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.triangle[:, :, :n, :n] == 0, float("-inf"))
        return scores.softmax(-1) @ v


class AddedMask(Decoder):
    """A triangle of minus infinity, made at each call."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        mask = torch.triu(torch.full((n, n), float("-inf")), 1)
        return F.scaled_dot_product_attention(q, k, v, mask)


class Alibi(Decoder):
    """Distances in place of positions."""

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        places = torch.arange(q.shape[2])
        distance = places[None, :] - places[:, None]
        slopes = torch.tensor([0.5, 0.25])[:, None, None]
        bias = (slopes * distance).masked_fill(distance > 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, bias)


class Einsum(Decoder):
    """Letters, and `where`."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        shares = torch.where(seen, scores, torch.tensor(-1e9)).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", shares, v)


class Window(Decoder):
    """Three tokens back, and no further."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        places = torch.arange(q.shape[2])
        distance = places[:, None] - places[None, :]
        return F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < 3))


class HeadsInBatch(Decoder):
    """The heads share an axis with the batch."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, n, size = q.shape
        q, k, v = (t.reshape(batch * heads, n, size) for t in (q, k, v))
        mask = torch.full((n, n), -1e9).triu(1)
        shares = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(size) + mask).softmax(-1)
        return torch.bmm(shares, v).view(batch, heads, n, size)


class OneHot(Decoder):
    """The table of words is a matrix, multiplied by ones and zeros."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        words = F.one_hot(input_ids, WORDS).float() @ self.embed.weight
        x = words + F.one_hot(torch.arange(input_ids.shape[1]), LONGEST).float() @ self.place.weight
        for packed, out in zip(self.packed, self.out, strict=True):
            q, k, v = packed(x).chunk(3, -1)
            heads = [t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in (q, k, v)]
            x = x + out(self.attend(*heads).transpose(1, 2).flatten(2))
        return self.head(x)


class OtherName(Decoder):
    """The token ids have a name of their own."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


BY_HAND = {
    cls.__name__: cls
    for cls in (Decoder, BufferMask, AddedMask, Alibi, Einsum, Window, HeadsInBatch, OneHot, OtherName)
}


class Wide(Decoder):
    """Heads of 16 features."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.packed = nn.ModuleList(nn.Linear(WIDTH, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, WIDTH) for _ in range(2))


WIDE: dict[str, type[Decoder]] = {name: type(f"Wide{name}", (Wide, cls), {}) for name, cls in BY_HAND.items()}


class Bidirectional(Decoder):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class BidirectionalScores(Decoder):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class OneAhead(Decoder):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, torch.ones(n, n, dtype=torch.bool).tril(1))


class PositionsOfIds(Decoder):
    """As RoBERTa's: padding is found in the ids."""

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.place((input_ids != 1).long().cumsum(1))


class MaskOfIds(Decoder):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen = (input_ids != 0)[:, None, None, :]
        return super().forward(input_ids)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, self.seen & torch.ones(n, n, dtype=torch.bool).tril())


class LastTwo(Decoder):
    """Each token is added to the one before it."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids)[:, :-1]


def convolution() -> nn.Module:
    def mix(model: Any, x: torch.Tensor) -> torch.Tensor:
        return F.pad(model.filter(x.transpose(1, 2)), (0, 0)).transpose(1, 2)

    return Decoder(mix, 1, filter=nn.Conv1d(WIDTH, WIDTH, 3, padding=1))


def mixed(mix: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Decoder(lambda _, x: mix(x), 1)


MIXES_TOKENS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (convolution, "convolution along the tokens"),
    "cumsum": (mixed(lambda x: x.cumsum(1)), "it works along the tokens"),
    "mean": (mixed(lambda x: x - x.mean(1, keepdim=True)), "one value from all tokens"),
    "maximum": (mixed(lambda x: x + x.amax(1, keepdim=True)), "one value from all tokens"),
    "roll": (mixed(lambda x: x + x.roll(1, 1)), "it works along the tokens"),
    "flip": (mixed(lambda x: x + x.flip(1)), "it works along the tokens"),
    "softmax": (mixed(lambda x: x.softmax(1)), "it works along the tokens"),
    "shift": (mixed(lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]), "token"),
    "first token": (mixed(lambda x: x + x[:, :1]), "it takes some of the tokens"),
    "norm": (mixed(lambda x: F.normalize(x, dim=1)), "one value from all tokens"),
    "variance": (mixed(lambda x: x / x.var(1, keepdim=True)), "one value from all tokens"),
    "all with all": (mixed(lambda x: x + (x @ x.transpose(1, 2)) @ x), "each token meets every other token"),
    "positions of the ids": (PositionsOfIds, "it works along the tokens"),
    "mask of the ids": (MaskOfIds, "mask"),
    "bidirectional": (Bidirectional, "the attention is not causal"),
    "bidirectional scores": (BidirectionalScores, "the attention is not causal"),
    "one ahead": (OneAhead, "the attention is not causal"),
    "without the last": (LastTwo, "it takes some of the tokens"),
}
"""Name -> a model that a cache cannot hold, and what the refusal says."""
