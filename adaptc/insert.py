"""Insert any method: what all kinds of it have in common. Each kind has a pass class of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.aliases import OnAlias
from adaptc.errors import InputError, Refusal
from adaptc.expression import cut
from adaptc.graph import Adaptation, Graph
from adaptc.method import Method, Param
from adaptc.names import shared_name
from adaptc.peft_keys import as_stored
from adaptc.pipeline import Pass
from adaptc.select import Selection, Target, select
from adaptc.sites import ADAPTATION, Site
from adaptc.weights import Computed, Weight, initial, seeded


@dataclass(frozen=True)
class Insert(Pass):
    """Put a method in at every site the target names. Subclasses say how."""

    target: Target = ()
    exclude: tuple[str, ...] = ()
    adapter: str = "default"
    entry: int = 0
    seed: int = 0
    on_alias: OnAlias = "refuse"
    """What to do where the weight is used elsewhere too: give the site its own, stay live when the rest is folded,
    change it everywhere, or refuse to fold."""
    as_stored: bool = False
    """Parameters named by themselves are (out, in) as they are stored, however the model multiplies by them."""
    trained: bool = False
    """It comes from a checkpoint, and is taken as it is: a rank above the layer's size wastes, but is right."""

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted"})
    leaves: ClassVar[str | None] = "adapted"
    changes_results: ClassVar[bool] = True
    method_class: ClassVar[Any]

    @property
    def method(self) -> Any:
        """The method with the options of this pass."""
        own = {f.name for f in dataclasses.fields(Insert)}
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return self.method_class(**options)

    def selection(self, graph: Graph) -> Selection:
        """What the target matches in this graph."""
        found = select(graph, self.target, self.exclude, self.method)
        if not self.as_stored:
            return found
        return dataclasses.replace(found, sites=tuple(as_stored(site, graph) for site in found.sites))

    def refused(self, site: Site) -> tuple[tuple[str, ...], str] | None:
        """The option at fault and why this cannot be inserted at a site; None if it can."""
        return self.method.refuses(site) or (None if self.trained else self.method.refuses_to_train(site))

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target matches, the method can sit there, and the adapter's names are free."""
        method, selection = self.method, self.selection(graph)
        if not selection.sites:
            near = f"; near: {', '.join(selection.near)}" if selection.near else ""
            return [Refusal(f"{self.name}: the target {self.target!r} matches no site{near}")]
        refusals = []
        for site in selection.sites:
            reason = self.refused(site)
            if reason:
                refusals.append(Refusal(f"{method.name}: {reason[1]}\n  site {site}", (site.uses[0].node,)))
                continue
            if any(name in graph.weights for name, _ in self.tensors(site, selection.sites).values()):
                refusals.append(
                    Refusal(
                        f"{method.name}: the adapter {self.adapter!r} sits on {site.module} already; "
                        "give this entry another `name`",
                        (site.uses[0].node,),
                    )
                )
        return refusals

    def tensors(self, site: Site, sites: Sequence[Site]) -> dict[str, tuple[str, Param]]:
        """Argument of the expression -> name in the graph and tensor: a site's own, and what all sites share."""
        method = self.method.at(site)
        own = {k: (parameter_name(site, method, self.adapter, p), p) for k, p in method.stored(site).items()}
        return own | {k: (shared_name(self.adapter, p.key), p) for k, p in method.shared(sites).items()}

    def ensures(self, graph: Graph) -> str | None:
        """Every planned site was rewritten."""
        planned = {str(site) for site in self.selection(graph).sites}
        rewritten = {str(a.site) for a in graph.adaptations if a.entry == self.entry}
        left = planned - rewritten
        return f"{self.name} planned {', '.join(sorted(left))}, but did not rewrite it" if left else None

    def attached(
        self, graph: Graph, site: Site, named: Mapping[str, tuple[str, Param]], value: fx.Node | None
    ) -> dict[str, fx.Node]:
        """The nodes of a site's tensors by argument; what is not there yet is made, from the weight so far."""
        own = self.method.at(site).stored(site)
        for argument, (name, param) in named.items():
            if name not in graph.weights:  # of what sites share, the first makes it
                weight = self._initial(graph, name, param, site, value, argument in own)
                graph.attach(name, weight, param.trained, param.stored)
        return {argument: graph.parameter_node(name) for argument, (name, _) in named.items()}

    def recorded(
        self, graph: Graph, site: Site, named: Mapping[str, tuple[str, Param]]
    ) -> dict[str, Adaptation]:
        """Note that a site is adapted; gives the mark that the nodes made for it carry."""
        method = self.method.at(site)
        adaptation = Adaptation(site, method, self.method, self.adapter, self.entry, named, self.on_alias)
        graph.adaptations.append(adaptation)
        return {ADAPTATION: adaptation}

    def _initial(
        self, graph: Graph, name: str, param: Param, site: Site, value: fx.Node | None, own: bool
    ) -> Weight:
        init, seed, batch = param.init, self.seed, site.batch if own else None
        each = param.shape[1:] if batch is not None and param.unpack is None else param.shape
        so_far = None if isinstance(init, str) or value is None else self._starting_point(graph, site, value)
        dtype = site.dtype if param.below is None else torch.int64

        def one(W: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
            if isinstance(init, str):
                return initial(init, each, generator)
            assert W is not None
            return init(W, generator).reshape(each)

        def make() -> torch.Tensor:
            generator = seeded(seed, name)
            W = site.matrix(so_far()) if so_far is not None else None
            if each == param.shape:
                made = one(W, generator)
            else:
                made = torch.stack([one(None if W is None else W[i], generator) for i in range(batch or 0)])
            return made.to(dtype).clone()

        return Computed(param.shape, dtype, make)

    def _starting_point(self, graph: Graph, site: Site, value: fx.Node) -> Callable[[], torch.Tensor]:
        """What functions that initialise get: the weight so far, its Fisher information, or what it has lost."""
        if self.method.makes_up:
            return graph.quantized[site.parameter].quantization.lost
        if not self.method.calibrated:
            return cut(graph, value).evaluate

        def estimated() -> torch.Tensor:
            if graph.information is None:
                raise InputError(f"{self.method.name} chooses by data: give it `calibration`")
            return graph.information(site.parameter)

        return estimated


def parameter_name(site: Site, method: Method, adapter: str, param: Param) -> str:
    """The full name of a parameter: PEFT's own, `module.lora_A.default.weight`, where its key is free."""
    first, dot, rest = param.key.partition(".")
    if first == site.leaf:
        first, dot, rest = method.name.replace("-", "_"), ".", param.key
    first += f"_{site.part}" if site.part else ""
    return ".".join(part for part in (site.module, first, adapter) if part) + (dot + rest if rest else "")
