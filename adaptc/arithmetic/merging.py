"""Several tensors as one: the rules by which PEFT's `add_weighted_adapter` merges those of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ON_FACTORS = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The ways to combine that act on the factors A and B of each adapter."""
RANDOM, SMALL, SIGNS = "dare", ("ties", "magnitude_prune"), ("ties", "dare_ties")
"""What prunes at random; what prunes the smallest numbers; what keeps the sign that most have."""


@dataclass(frozen=True)
class Merge:
    """A rule that makes one tensor of several: `Σ weight · tensor`, of pruned tensors, of the elected sign alone.

    `linear` and `svd` prune nothing. `magnitude_prune` and `ties` keep the share `density` of the largest numbers of
    each tensor; `dare_linear` and `dare_ties` keep a random share and divide it by `density` (Yu et al. 2023, DARE).
    `ties` and `dare_ties` elect a sign for every entry and take the mean over those that have it (Yadav et al. 2023).
    `_svd` behind a name says what is merged, not how.

    Attributes:
        how: the name of the rule.
        density: the share of the numbers that are kept, in (0, 1].
        majority_sign_method: the sign of the sum (`total`), or the sign that more tensors have (`frequency`).
    """

    how: str
    density: float = 1.0
    majority_sign_method: str = "total"

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The merged tensor, of the shape of each, in float32 or wider.

        Args:
            tensors: of one shape.
            weights: one for each.
            dtype: that of the adapter, in which random numbers are drawn.
            generator: where they come from, one tensor after the other.
        """
        rule = self.how.removesuffix("_svd")
        pruned = torch.stack([self._pruned(tensor, rule, dtype, generator) for tensor in tensors])
        wide = torch.promote_types(pruned.dtype, torch.float32)
        scale = torch.tensor(weights, dtype=wide).reshape(-1, *(1,) * (pruned.dim() - 1))
        if rule not in SIGNS:
            return (pruned * scale).sum(0)
        votes = pruned.sum(0) if self.majority_sign_method == "total" else pruned.sign().sum(0)
        elected = pruned.sign() == torch.where(votes >= 0, 1, -1)
        return (pruned * scale * elected).sum(0) / elected.sum(0).clamp(min=1)

    def _pruned(
        self, tensor: torch.Tensor, rule: str, dtype: torch.dtype, generator: torch.Generator
    ) -> torch.Tensor:
        """A tensor with the share `density` of its numbers, and zeros."""
        if self.density == 1:
            return tensor
        if rule.startswith(RANDOM):
            mask = torch.bernoulli(torch.full(tensor.shape, self.density, dtype=dtype), generator=generator)
            return tensor * mask.to(tensor.dtype) / self.density
        if rule not in SMALL:
            return tensor
        mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
        mask[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * mask.reshape(tensor.shape)
