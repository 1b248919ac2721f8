"""The small sites that a method is tried on, and the tensors that its expressions get there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from adaptc.methods.point_sites import AttentionSite, Heads, HeadSite, InputSite, Site, SubLayer
from adaptc.methods.site import ATTENTION_POINT, HEAD, INPUT, SUBLAYER, Layout, Use, WeightSite

if TYPE_CHECKING:
    from torch import Tensor

OUT, IN, BATCH, TOKENS = 24, 16, 2, 3
"""The sizes: rows and columns of a weight, sequences in a batch, tokens in a sequence."""


def trial_sites(kinds: Collection[str]) -> Iterator[Site]:
    """A small site of each kind. `experts` have none: a method sees each of their matrices as it sees `linear`."""
    import torch

    use, dtype = (Use("layer", 1),), torch.float32
    if "linear" in kinds:
        yield _weight("linear", "Linear", "linear", (OUT, IN), Layout((0,), (1,)), has_bias=True)
    if "conv" in kinds:
        yield _weight("conv", "Conv2d", "conv2d", (OUT, IN, 1, 1), Layout((0,), (1, 2, 3)), has_bias=True)
    if "embedding" in kinds:
        yield _weight("embedding", "Embedding", "embedding", (IN, OUT), Layout((1,), (0,)))
    if "parameter" in kinds:
        yield _weight("parameter", "LayerNorm", "layer_norm", (IN,), None)
    if SUBLAYER in kinds:
        yield SubLayer("layer", "Block", SUBLAYER, "linear", dtype, use, "", width=IN, reads="x")
    if ATTENTION_POINT in kinds:
        heads = Heads(count=2, key=4, value=4)
        yield AttentionSite("layer", "Block", ATTENTION_POINT, "softmax", dtype, use, "", heads=heads)
    if INPUT in kinds:
        yield InputSite(
            *("layer", "Block", INPUT, "embedding"), dtype, use, "",
            table="layer.weight", leaf="weight", width=IN, ids="ids",
        )  # fmt: skip
    if HEAD in kinds:
        yield HeadSite(
            *("layer", "Block", HEAD, "linear"), dtype, use, "",
            output="output", width=IN, tokens=True, mask="mask", ids="ids",
        )  # fmt: skip


def _weight(
    kind: str, type: str, op: str, shape: tuple[int, ...], layout: Layout | None, has_bias: bool = False
) -> WeightSite:
    import torch

    return WeightSite(
        module="layer",
        type=type,
        kind=kind,
        op=op,
        dtype=torch.float32,
        uses=(Use("layer", 1),),
        source="",
        parameter="layer.weight",
        leaf="weight",
        shape=shape,
        layout=layout,
        bias="layer.bias" if has_bias else None,
        bias_uses=(Use("layer", 2),) if has_bias else (),
    )


def twice_as_large(site: Site) -> Site:
    """The same site with every size doubled."""
    if isinstance(site, WeightSite):
        return dataclasses.replace(site, shape=tuple(2 * size for size in site.shape))
    if isinstance(site, AttentionSite):
        heads = site.heads
        larger = heads and Heads(2 * heads.count, 2 * heads.key, 2 * heads.value)
        return dataclasses.replace(site, heads=larger)
    return dataclasses.replace(site, width=site.width and 2 * site.width)


def operands(hook: str, site: Site) -> tuple[Tensor, ...]:
    """What an expression gets on a site before its own tensors, in float32.

    Returns:
        `W (out, in)` for `weight`, `b (out,)` for `bias`, `z (batch, tokens, in)` for `branch`,
        `h (batch, tokens, in)` and `m (batch, tokens)` for `pooled`; nothing for `tokens`.
    """
    if hook == "weight":
        assert isinstance(site, WeightSite)
        return (site.matrix(numbers(*site.shape)),)
    if hook == "bias":
        return (numbers(OUT),)
    h = numbers(BATCH, TOKENS, IN)
    return {"branch": (h,), "pooled": (h, h[..., 0].bool())}.get(hook, ())


def tokens_shape(method: Any, site: Site) -> tuple[int, ...]:
    """The shape that `tokens` of a method with virtual tokens gives on a site."""
    count: int = method.num_virtual_tokens * method.num_transformer_submodules
    if isinstance(site, AttentionSite):
        return count, method.columns([site])[-1]
    return count, IN


def numbers(*shape: int) -> Tensor:
    """Standard normal numbers of a shape, in float32, the same at each call."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
