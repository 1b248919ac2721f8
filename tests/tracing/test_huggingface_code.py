"""What is replaced in transformers' code while it is traced: it computes the same, or is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.export import export
from adaptc.tracing.huggingface.code import images_together

IDS = replace(InputSpec.parse("ids", "int64[batch, seq]"), high=9, placeholders=(8, 2))
IMAGES = InputSpec.parse("images", "float32[batch, 2, 4]")


class Listed(nn.Module):
    """Makes a list of its images, and puts them in the places of a token."""

    def __init__(self, scaled: bool = False):
        super().__init__()
        self.table, self.scaled = nn.Embedding(9, 4), scaled

    def forward(self, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        listed = list(images)
        if self.scaled:
            listed = [image / image.norm() for image in listed]
        tokens = self.table(ids)
        return tokens.masked_scatter((ids == 8).unsqueeze(-1), torch.cat(listed, dim=0))


def test_a_list_of_images_that_is_concatenated_keeps_their_number_open() -> None:
    model = Listed()
    traced = export(model, (IDS, IMAGES))
    for batch, length in ((2, 5), (1, 3)):
        ids = torch.randint(0, 8, (batch, length))
        ids[:, 1:3] = 8
        images = torch.randn(batch, 2, 4)
        assert torch.equal(traced(ids, images), model(ids, images))


def test_a_list_of_images_that_is_used_otherwise_is_refused() -> None:
    with pytest.raises(
        TraceError, match=r"does more than concatenate them: linalg_vector_norm\n  from test_hugg"
    ):
        export(Listed(scaled=True), (IDS, IMAGES))


def test_tensors_are_as_before_afterwards() -> None:
    iterate, length = torch.Tensor.__iter__, torch.Tensor.__len__
    with images_together():
        assert [row.tolist() for row in torch.eye(2)] == [[1, 0], [0, 1]]
        assert len(torch.zeros(3, 2, 2)) == 3
    assert (torch.Tensor.__iter__, torch.Tensor.__len__) == (iterate, length)
