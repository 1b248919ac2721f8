"""The layers of an adapter that is made of others: at each a low-rank product, by factors or by changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptc.arithmetic.change import Change, Changes
from adaptc.arithmetic.merging import Merge
from adaptc.errors import AdaptcError
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.graph import Graph
from adaptc.methods.low_rank import Product
from adaptc.methods.param import Param
from adaptc.methods.site import Use, WeightSite
from adaptc.methods.tensors import norm

TINY = 1e-30
"""The smallest norm that an error is divided by."""


@dataclass(frozen=True)
class Part:
    """One adapter of a sum.

    Attributes:
        weight: what it is multiplied by.
        adapted: the base with this adapter inserted.
        changes: what it changes.
    """

    weight: float
    adapted: Graph
    changes: Changes


class PartError(AdaptcError):
    """An adapter cannot be combined as asked.

    Attributes:
        part: its number, from 0; None where it is no single one.
    """

    def __init__(self, part: int | None, message: str, *notes: str):
        self.part = part
        super().__init__(message, *notes)


@dataclass(frozen=True)
class Layer:
    """One matrix that the new adapter changes.

    Attributes:
        site: the matrix.
        rank: the rank of its product.
        make: gives A and B as the method's expression takes them, for a method of this rank with a scale of one, and
            their relative error where they stand for a change; random numbers come from the generator.
    """

    site: WeightSite
    rank: int
    make: Callable[[Product, torch.Generator], tuple[Mapping[str, torch.Tensor], float | None]]


def by_factors(parts: Sequence[Part], merge: Merge, uses: Sequence[Use]) -> list[Layer]:
    """The layers of a combination of the factors A and B, as PEFT combines LoRA adapters.

    A term `weight · scale · B A` is split: `sqrt(|weight scale|)` is on both factors, the sign on A. Then the A of
    all adapters become one A, and the B one B. For `cat` A has the whole scale, and they stand side by side.

    Args:
        parts: the adapters.
        merge: the rule for factors.
        uses: the places of the matrices.

    Raises:
        PartError: an adapter changes a matrix by something else than one product, or ranks differ where they are added.
    """
    terms: dict[tuple[Use, tuple[tuple[int, int], ...]], list[tuple[int, Adaptation]]] = {}
    for number, part in enumerate(parts):
        for a in (a for use in uses if use in part.changes for a in part.changes[use].adaptations):
            assert isinstance(a.site, WeightSite)
            members = terms.setdefault((a.site.uses[0], a.site.rows), [])
            if any(number == other for other, _ in members) or not _only_product(a):
                raise PartError(
                    number,
                    f"{merge.how} combines A and B of one product; {a.method.name} has another form on {a.site.name}",
                    "combine the changes of weights instead: how: svd",
                )
            members.append((number, a))
    return [_factored(parts, members, merge) for members in terms.values()]


def _only_product(a: Adaptation) -> bool:
    return isinstance(a.method, Product) and a.method.only_product


def _factored(parts: Sequence[Part], members: Sequence[tuple[int, Adaptation]], merge: Merge) -> Layer:
    """One layer of `by_factors`.

    Args:
        parts: the adapters.
        members: the number of each adapter that is on the layer, and its adaptation.
        merge: the rule.
    """
    site, ranks = members[0][1].site, [_rank(a) for _, a in members]
    assert isinstance(site, WeightSite)
    joined = merge.how == "cat"
    if not joined and len(set(ranks)) > 1:
        raise PartError(
            members[1][0],
            f"{merge.how} adds A and B of equal ranks, and {site.name} has ranks {', '.join(map(str, ranks))}",
            "put the factors side by side (how: cat), or combine changes of weights (how: svd)",
        )

    def make(_: Product, generator: torch.Generator) -> tuple[Mapping[str, torch.Tensor], float | None]:
        scales = [parts[number].weight * _scale(a) for number, a in members]
        factors = {k: [_loaded(parts[n].adapted, a, k) for n, a in members] for k in ("A", "B")}
        if joined:
            scaled = [A * scale for A, scale in zip(factors["A"], scales, strict=True)]
            return {"A": torch.cat(scaled, -2), "B": torch.cat(factors["B"], -1)}, None
        roots = [abs(scale) ** 0.5 for scale in scales]
        signed = [root if scale >= 0 else -root for root, scale in zip(roots, scales, strict=True)]
        weights = {"A": signed, "B": roots}
        theta = {k: merge(factors[k], weights[k], site.dtype, generator) for k in factors}
        products = [s * (B @ A) for s, A, B in zip(scales, factors["A"], factors["B"], strict=True)]
        wanted = torch.stack(products).sum(0)
        return theta, _error(theta["B"] @ theta["A"], wanted) if merge.how == "linear" else None

    return Layer(site, sum(ranks) if joined else ranks[0], make)


def _rank(a: Adaptation) -> int:
    assert isinstance(a.method, Product)
    return a.method.r


def _scale(a: Adaptation) -> float:
    assert isinstance(a.method, Product)
    return a.method.scale


def _loaded(graph: Graph, a: Adaptation, argument: str) -> torch.Tensor:
    """A factor of an adapter as the method's expression takes it."""
    name, param = a.params[argument]
    value = graph.weights[name].load()
    return param.unpack(value) if param.unpack is not None else value


def by_changes(parts: Sequence[Part], merge: Merge, rank: int, uses: Sequence[Use]) -> list[Layer]:
    """The layers of a combination of changes: at each the best product of a rank, or of its smaller side.

    Args:
        parts: the adapters.
        merge: the rule for changes.
        rank: the rank.
        uses: the places of the matrices.
    """
    return [_nearest([(p.weight, p.changes[u]) for p in parts if u in p.changes], merge, rank) for u in uses]


def _nearest(terms: Sequence[tuple[float, Change]], merge: Merge, rank: int) -> Layer:
    site = terms[0][1].site

    def make(method: Product, generator: torch.Generator) -> tuple[Mapping[str, torch.Tensor], float]:
        merged = merge(
            [change.delta() for _, change in terms], [weight for weight, _ in terms], site.dtype, generator
        )
        wanted = site.matrix(merged)
        matrices = (wanted,) if site.batch is None else wanted.unbind()
        one = [method.nearest(M) for M in matrices]
        stacked = {k: torch.stack([theta[k] for theta in one]).to(site.dtype) for k in one[0]}
        theta = stacked if site.batch is not None else {k: value[0] for k, value in stacked.items()}
        held = method.scale * (theta["B"].to(wanted.dtype) @ theta["A"].to(wanted.dtype))
        return theta, _error(held, wanted)

    return Layer(site, min(rank, site.out_features, site.in_features), make)


def _error(held: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float(norm(wanted - held) / norm(wanted).clamp(min=TINY))


def packed(param: Param, value: torch.Tensor) -> torch.Tensor:
    """A tensor in the shape that checkpoints store, from that of the method's expression: undoes `param.unpack`."""
    if param.unpack is None:
        return value.reshape(param.shape)
    numbers = torch.arange(torch.Size(param.shape).numel())
    order = param.unpack(numbers.reshape(param.shape)).flatten()
    stored = torch.empty(order.numel(), dtype=value.dtype)
    stored[order] = value.flatten()
    return stored.reshape(param.shape)


def layer_name(site: WeightSite) -> str:
    """A layer as errors are told for it."""
    return re.sub(r"\.weight$", "", site.name) + (f"[{site.piece}]" if site.piece else "")
