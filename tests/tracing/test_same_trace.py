"""A trace holds at a size where a condition of torch's own fails, if the same operations run there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.export import export

LENGTH = 40
TOKENS = (InputSpec.parse("x", "float32[batch, seq, 8]"),)


class Windowed(nn.Module):
    """Attention under a mask that is cut out of a table, as GPT-Neo does: at the full length nothing is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        table = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
        self.register_buffer("table", table.view(1, LENGTH, LENGTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys, queries = x.shape[1], x.shape[1]
        scores = self.layer(x) @ x.mT
        mask = self.table[:, keys - queries : keys, :keys]
        return torch.where(mask, scores, torch.tensor(-1e4)).softmax(-1) @ x


class Rolled(nn.Module):
    """The same operation at every size, with another number at large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(self.layer(x), 1 if x.shape[1] < LENGTH else 2, 1)


def test_a_table_that_is_cut_to_the_length_is_traced_for_its_full_length_too() -> None:
    torch.manual_seed(0)
    model = Windowed()
    traced = export(model, TOKENS)
    for length in (1, 7, LENGTH):
        x = torch.randn(2, length, 8)
        assert torch.equal(traced(x=x), model(x))


def test_another_number_in_the_same_operations_is_another_branch() -> None:
    with pytest.raises(TraceError, match=r"takes another branch at seq=680 than at seq=17, where `seq < 40`"):
        export(Rolled(), TOKENS)


class Chunked(nn.Module):
    """A state that is carried from chunk to chunk, as in Mamba 2: a short text is one chunk, which would broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        rest = (LENGTH - length % LENGTH) % LENGTH
        chunks = torch.nn.functional.pad(self.layer(x), (0, 0, 0, rest)).reshape(batch, -1, LENGTH, 8)
        sums = chunks.sum(2, keepdim=True)
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1).cumsum(1)[:, :-1]
        return (chunks + before.expand(chunks.shape)).reshape(batch, -1, 8)[:, :length]


def test_a_text_of_one_chunk_is_traced_for_many() -> None:
    torch.manual_seed(0)
    model = Chunked()
    traced = export(model, TOKENS)
    for length in (1, 17, LENGTH, LENGTH + 1, 3 * LENGTH, 170):
        x = torch.randn(2, length, 8)
        assert torch.equal(traced(x=x), model(x)), length


class Looped(Chunked):
    """Goes through several chunks in a loop, which a trace keeps as it ran."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = super().forward(x)
        if x.shape[1] <= LENGTH:
            return chunks
        for start in range(LENGTH, x.shape[1], LENGTH):
            chunks = chunks + chunks[:, start : start + 1]
        return chunks


def test_a_loop_over_chunks_is_told_as_a_branch() -> None:
    with pytest.raises(TraceError, match=r"takes another branch at seq=680 than at seq=17, where "):
        export(Looped(), TOKENS)
