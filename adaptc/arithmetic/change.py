"""Changes: what an adapter does to each tensor of its base, read off the adapted graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adaptc.ir.adaptation import Adaptation
from adaptc.ir.graph import Graph
from adaptc.methods.method import WeightMethod
from adaptc.methods.site import Use, WeightSite
from adaptc.rewriter.expression import extract_expression
from adaptc.weights import Weight


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter, or a training, does to one tensor of the base.

    Attributes:
        site: where the base has the tensor.
        base: gives its value in the base, in a wide dtype.
        adapted: gives its value after the change.
        adaptations: the adaptations that change it, in order; none where two models are compared.
    """

    site: WeightSite
    base: Callable[[], torch.Tensor]
    adapted: Callable[[], torch.Tensor]
    adaptations: list[Adaptation] = field(default_factory=list[Adaptation])

    @property
    def whole(self) -> bool:
        """Whether the adapter holds the tensor itself, not a change of it."""
        return bool(self.adaptations) and all(a.method.replaces for a in self.adaptations)

    def delta(self) -> torch.Tensor:
        """The adapted tensor minus the base's, in the stored shape."""
        return self.adapted() - self.base()


Changes = Mapping[Use, Change]
"""The first use of a tensor in the base -> its change; of each layer, in the order of execution."""


def places(base: Graph) -> dict[Use, WeightSite]:
    """Every use of a weight -> its site in a traced graph; where another module reads it too, that of its owner."""
    foreign = {use: site for site in base.sites for use in site.foreign}
    return foreign | {use: site for site in base.sites for use in site.uses}


def changes_of(base: Graph, adapted: Graph) -> dict[Use, Change]:
    """What the adapters of a graph change.

    Args:
        base: the traced graph.
        adapted: the same with adapters inserted, none of which `stays`; their weights are read late.
    """
    sites, nodes = places(base), adapted.by_name()
    changes: dict[Use, Change] = {}
    for adaptation in adapted.adaptations:
        site = adaptation.site
        assert isinstance(site, WeightSite)
        method = adaptation.method
        biased = isinstance(method, WeightMethod) and method.adapts_bias() and site.bias is not None
        beside = site.bias_uses[:1] if biased else ()
        for use in (site.uses[0], *beside):
            parameter = site.bias if use in beside else site.parameter
            value = nodes[adapted.adapted_weights[str(parameter), use.node]]
            before = adapted.base_value(str(parameter))
            if value is before:  # a bias that the method leaves as it is here
                continue
            if use not in changes:
                changes[use] = Change(
                    sites[use],
                    extract_expression(adapted, before).evaluate,
                    extract_expression(adapted, value).evaluate,
                )
            changes[use].adaptations.append(adaptation)
    return changes


def changes_between(base: Graph, tuned: Mapping[str, Weight]) -> dict[Use, Change]:
    """What a training did to each tensor of a model; tensors that are equal are left out, and none is kept loaded.

    Args:
        base: the traced graph of the model before it.
        tuned: name in that graph -> weight after it.
    """
    changes: dict[Use, Change] = {}
    for site in _one_a_tensor(base):
        before, after = base.weights[site.parameter], tuned[site.parameter]
        if not torch.equal(before.load(), after.load()):
            changes[site.uses[0]] = Change(site, _wide(before), _wide(after))
    return changes


def _one_a_tensor(base: Graph) -> Iterable[WeightSite]:
    """The first site of every tensor, in the order of execution."""
    return {base.aliases[site.parameter]: site for site in reversed(base.sites)}.values()


def _wide(weight: Weight) -> Callable[[], torch.Tensor]:
    """Gives a weight in the dtype that expressions are evaluated in."""
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return lambda: weight.exact().to(wide)
