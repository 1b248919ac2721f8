"""The keys and values of a text that is being written, in buffers of a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import dtype


class Buffers:
    """What each attention of a decoder has computed so far: a buffer for its keys, one for its values.

    `GenerationMixin` of transformers holds one as it does its own caches.

    Args:
        specs: the inputs of a graph that are buffers, `(batch, heads, total, size)`.
        room: for how many tokens there is room at first.
        first: keys and values of virtual tokens, `(1, heads, virtual, size)`, that stand in front of every text, by the
            names of the inputs. Nobody counts them but the graph.
    """

    is_compileable = False
    """What transformers asks a cache: whether it may compile the model by itself."""
    is_sliding = is_linear = is_dummy = (False,)
    """And of the layers: whether they keep a window, a state in place of keys, or nothing."""

    def __init__(
        self, specs: Sequence[InputSpec], room: int, first: Mapping[str, torch.Tensor] | None = None
    ):
        self.first = dict(first or {})
        self.virtual = next((keys.shape[2] for keys in self.first.values()), 0)
        self.specs, self.room, self.length = specs, room + self.virtual, self.virtual
        self.tensors: list[torch.Tensor] = []

    def reserve(self, batch: int, tokens: int, device: torch.device) -> None:
        """Make room for so many more tokens of so many sequences."""
        needed = self.length + tokens
        if self.tensors and needed <= self.room:
            return
        self.room = max(self.room, needed)
        fresh = [self._empty(spec, batch, device) for spec in self.specs]
        before = self.tensors or [self.first[spec.name] for spec in self.specs if self.first]
        for new, old in zip(fresh, before, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        self.tensors = fresh

    def _empty(self, spec: InputSpec, batch: int, device: torch.device) -> torch.Tensor:
        sizes = [self.room if dim == TOTAL else int(dim) for dim in spec.dims[1:]]
        return torch.zeros([batch, *sizes], dtype=dtype(spec), device=device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are in them, without virtual ones."""
        return self.length - self.virtual

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences with these numbers, as a beam search goes on with some of them."""
        self.tensors = [tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in self.tensors]

    def crop(self, max_length: int) -> None:
        """Forget the tokens behind so many; a negative number of tokens is forgotten."""
        count = self.get_seq_length()
        self.length = self.virtual + (max_length if max_length >= 0 else max(count + max_length, 0))
