"""Bottleneck: a small feed-forward after a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.methods.activation import SmallFeedForward
from adaptc.methods.method import method


@method("bottleneck")
@dataclass(frozen=True)
class Bottleneck(SmallFeedForward):
    """h' = h + s (W_up σ(W_down h + b_down) + b_up)    W_down (r, d)   W_up (d, r)    Houlsby et al. 2019, section 2.1

    h `(..., d)` is the output of a sub-layer, before the residual sum. Houlsby et al. put one after every attention
    and every feed-forward, `target: "*"`; Pfeiffer et al. 2021 after feed-forwards alone,
    `target: {role: feed_forward.out}`; AdapterDrop (Rücklé et al. 2021) skips the lowest layers,
    `target: {layers: 5-11}`.
    """
