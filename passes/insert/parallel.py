"""Parallel adapter: a small feed-forward beside a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.methods.activation import SmallFeedForward
from adaptc.methods.method import method


@method("parallel")
@dataclass(frozen=True)
class Parallel(SmallFeedForward):
    """h' = h + s (W_up σ(W_down x + b_down) + b_up)    W_down (r, d)   W_up (d, r)    He et al. 2022, section 4.1

    h `(..., d)` is the output of a sub-layer and x `(..., d)` its input, which its first matrix product reads. The
    scaled parallel adapter (their section 4.6) has `scale: 4` and sits at feed-forwards,
    `target: {role: feed_forward.out}`.
    """

    reads = "input"
