"""An adaptation: one method on one site of a graph, as it was inserted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adaptc.methods.method import Method, WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.point_sites import Site

OnAlias = Literal["refuse", "untie", "live", "share"]
"""What is done about an adapted tensor that other operations use too: `refuse` to fold into it, `untie` it (the site
gets a tensor of its own), keep the adapter `live` in the folded graph, or `share` it (every use is adapted)."""


@dataclass(frozen=True, eq=False)
class Adaptation:
    """One method on one site, as inserted. Two adaptations are equal only if they are one object.

    Attributes:
        site: the site.
        method: with the options of this site.
        declared: the method with the options as the spec's entry declares them.
        adapter: the name of the adapter.
        entry: the number of the spec's entry.
        params: argument of the method's expression -> (name of the tensor in the graph, its declaration).
        on_alias: what to do if the adapted tensor is also used elsewhere.
    """

    site: Site
    method: Method[Any]
    declared: Method[Any]
    adapter: str
    entry: int
    params: Mapping[str, tuple[str, Param]]
    on_alias: OnAlias = "refuse"

    @property
    def stays(self) -> bool:
        """Whether folding leaves the adaptation in the graph: it adapts no weight, but activations or inputs."""
        return not isinstance(self.method, WeightMethod)

    def shares(self, argument: str) -> bool:
        """Whether all sites of the entry use one tensor for this argument of the expression."""
        return argument not in self.method.stored(self.site)
