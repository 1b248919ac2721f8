"""A model no library knows: what `specs/own-model.yaml` adapts."""

import torch
from torch import nn


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x)), with dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One residual block on `x (batch, width)`."""
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Classifier(nn.Module):
    """A small residual network with a head."""

    def __init__(self, features: int, width: int, classes: int):
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` of `x (batch, features)`."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(features: int, width: int, classes: int) -> nn.Module:
    """The factory that the spec names; a real one would load trained weights here."""
    torch.manual_seed(0)
    return Classifier(features, width, classes)
