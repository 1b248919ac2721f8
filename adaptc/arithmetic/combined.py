"""An adapter that is made of others: which tensors it has where, and their values once they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from adaptc.arithmetic.change import Change
from adaptc.arithmetic.layers import Layer, Part, PartError, by_changes, by_factors, layer_name, packed
from adaptc.arithmetic.merging import ON_FACTORS, Merge
from adaptc.checkpoints.graph_records import weight_order
from adaptc.ir.adaptation import OnAlias
from adaptc.ir.graph import Graph
from adaptc.methods.low_rank import Product
from adaptc.methods.method import METHODS, Method
from adaptc.methods.peft_format import peft_name
from adaptc.methods.site import MATRIX_KINDS, Use, WeightSite
from adaptc.patterns import literal
from adaptc.rewriter.insert.base import Insert
from adaptc.weights import Deferred, Weight


def product_methods() -> dict[str, type[Product]]:
    """The methods that can hold any change of a weight, by name."""
    return {name: cls for name, cls in METHODS.items() if issubclass(cls, Product)}


def _whole_method() -> Any:
    """The method that holds a tensor whole, PEFT's `modules_to_save`."""
    return next(c for c in METHODS.values() if c.peft is not None and c.peft.joins == "modules_to_save")


@dataclass(frozen=True)
class Whole:
    """A tensor that the new adapter holds whole: a bias, a norm, a head.

    Attributes:
        site: the tensor.
        terms: each adapter's weight and its change of the tensor.
    """

    site: WeightSite
    terms: Sequence[tuple[float, Change]]

    def value(self, merge: Merge, generator: torch.Generator) -> torch.Tensor:
        """The base's tensor with the merged changes."""
        deltas = [change.delta() for _, change in self.terms]
        weights = [weight for weight, _ in self.terms]
        merged = merge(deltas, weights, self.site.dtype, generator)
        return (self.terms[0][1].base() + merged).to(self.site.dtype)


@dataclass(frozen=True)
class Origin:
    """What an adapter was made of: an adapter, or a model.

    Attributes:
        text: its path as a spec or a command states it.
        path: the path itself.
        sha256: its hash.
        weight: what it was multiplied by.
    """

    text: str
    path: Path
    sha256: str
    weight: float = 1.0


@dataclass(eq=False)
class Combined:
    """An adapter made of others: low-rank products on matrices, and what is no matrix held whole.

    Attributes:
        base: the traced graph.
        merge: the rule.
        cls: the method that holds the products.
        layers: its matrices, in the order of the model.
        wholes: what it holds whole.
        seed: of the random numbers that the rule draws.
        on_alias: what its parts do about tensors that are used elsewhere too.
        origins: what it was made of.
    """

    base: Graph
    merge: Merge
    cls: type[Product]
    layers: Sequence[Layer]
    wholes: Sequence[Whole]
    seed: int
    on_alias: OnAlias = "refuse"
    origins: Sequence[Origin] = ()

    def inserts(self, adapter: str, entry: int, on_alias: OnAlias) -> list[Insert[Any, Any]]:
        """The passes that insert it, untrained; `starts` has its tensors.

        Args:
            adapter: its name.
            entry: the number of the spec's entry that it comes from.
            on_alias: as `Insert.on_alias`, where its parts refuse.
        """
        shared: dict[str, Any] = {
            "adapter": adapter,
            "entry": entry,
            "on_alias": on_alias if self.on_alias == "refuse" else self.on_alias,
            "trained": True,
        }
        whole, inserts = _whole_method(), list[Insert[Any, Any]]()
        if self.layers:
            named = tuple(literal(layer.site.name) for layer in self.layers if layer.site.named)
            target = [layer.site.pattern for layer in self.layers]
            inserts.append(Insert(self.method, target=target, as_stored=named, **shared))
        biases, others = self._whole_targets
        if biases:
            inserts.append(Insert(whole(parameters=("bias",)), target=biases, **shared))
        if others:
            inserts.append(Insert(whole(), target=others, **shared))
        return inserts

    @cached_property
    def method(self) -> Method[Any]:
        """The method with the rank of each layer."""
        ranks = {peft_name(layer.site): layer.rank for layer in self.layers}
        return self.cls.of_ranks(ranks, "lora_only" if self._whole_targets[0] else "none")

    @cached_property
    def _whole_targets(self) -> tuple[list[str], list[str]]:
        """Targets of what is held whole: layers whose bias goes with their product; modules, or single tensors.

        PEFT saves the biases of all layers that have a product, or of none; and modules whole. A single tensor is held
        of a module that has a product too.
        """
        products = dict.fromkeys(layer.site.module for layer in self.layers)
        biases = False
        others: dict[str, None] = {}
        for site in (whole.site for whole in self.wholes):
            beside = site.module in products or any(name.startswith(f"{site.module}.") for name in products)
            if site.module in products and site.leaf == "bias":
                biases = True
            else:
                others[literal(site.name if beside or not site.module else site.module)] = None
        return [literal(module) for module in products] if biases else [], list(others)

    def starts(self) -> dict[str, dict[str, Weight]]:
        """Pattern of a site -> argument of the method's expression -> tensor, in the shape that checkpoints store."""
        starts: dict[str, dict[str, Weight]] = {}
        for layer in self.layers:
            method: Any = self.method.at(layer.site)
            starts[layer.site.pattern] = {
                argument: Deferred(
                    param.shape, layer.site.dtype, partial(self._tensor, layer.site.pattern, argument)
                )
                for argument, param in method.stored(layer.site).items()
            }
        for whole in self.wholes:
            site = whole.site.as_parameter()
            for argument in _whole_method()().stored(site):
                weight = Deferred(site.shape, site.dtype, partial(self._tensor, site.pattern, argument))
                starts[site.pattern] = {argument: weight}
        return starts

    def _tensor(self, pattern: str, argument: str) -> torch.Tensor:
        return self._evaluated[0][pattern][argument]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> the rank of its product."""
        return {layer_name(layer.site): layer.rank for layer in self.layers}

    @property
    def held_whole(self) -> list[str]:
        """The tensors that are held whole and changed."""
        return [whole.site.name for whole in self.wholes]

    @property
    def errors(self) -> dict[str, float]:
        """Layer -> the relative error of its product in the Frobenius norm, where it stands for a sum of changes."""
        return self._evaluated[1]

    @cached_property
    def _evaluated(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
        """All tensors by pattern and argument, and the errors; in the order of the model, as PEFT draws its numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        errors: dict[str, float] = {}
        with torch.no_grad():
            for layer in self.layers:
                method: Any = self.method.at(layer.site)
                theta, error = layer.make(method, generator)
                if error is not None:
                    errors[layer_name(layer.site)] = error
                params = method.stored(layer.site)
                tensors[layer.site.pattern] = {k: packed(params[k], value) for k, value in theta.items()}
            for whole in self.wholes:
                site = whole.site.as_parameter()
                value = whole.value(self.merge, generator)
                tensors[site.pattern] = dict.fromkeys(_whole_method()().stored(site), value)
        return tensors, errors


def combined(
    base: Graph,
    parts: Sequence[Part],
    merge: Merge,
    rank: int | None = None,
    cls: type[Product] | None = None,
    seed: int = 0,
) -> Combined:
    """The adapter that parts make together.

    Matrices get a low-rank product; what an adapter holds whole, and what is no matrix, is held whole.

    Args:
        base: the traced graph.
        parts: the adapters.
        merge: the rule: of factors, or of changes.
        rank: the rank of the products where changes are combined; the largest of the adapters' if left out.
        cls: the method that holds the products; the first that can.
        seed: of random numbers.

    Raises:
        PartError: an adapter cannot be combined so, or no rank is known.
    """
    cls = cls or next(iter(product_methods().values()))
    order = weight_order(base)
    sites = {use: change.site for part in parts for use, change in part.changes.items()}
    uses = sorted(sites, key=lambda use: order[sites[use].parameter])
    on_matrix = [use for use in uses if sites[use].kind in MATRIX_KINDS and not _whole(parts, use)]
    if merge.how in ON_FACTORS:
        layers = sorted(by_factors(parts, merge, on_matrix), key=lambda layer: order[layer.site.parameter])
    else:
        layers = by_changes(parts, merge, rank or _largest_rank(parts), on_matrix)
    wholes = [
        Whole(sites[use], [(part.weight, part.changes[use]) for part in parts if use in part.changes])
        for use in uses
        if use not in on_matrix
    ]
    stated: list[OnAlias] = [
        a.on_alias for part in parts for a in part.adapted.adaptations if a.on_alias != "refuse"
    ]
    return Combined(base, merge, cls, layers, wholes, seed, stated[0] if stated else "refuse")


def _whole(parts: Sequence[Part], use: Use) -> bool:
    """Whether every adapter that changes a tensor holds it whole."""
    return all(part.changes[use].whole for part in parts if use in part.changes)


def _largest_rank(parts: Sequence[Part]) -> int:
    """The largest rank of the adapters.

    Raises:
        PartError: none has a rank.
    """
    ranks: list[int] = [
        r for p in parts for a in p.adapted.adaptations if (r := getattr(a.method, "r", None))
    ]
    if not ranks:
        raise PartError(
            None, "no adapter here has a rank that the result could have", "give one: svd_rank: 16"
        )
    return max(ranks)
