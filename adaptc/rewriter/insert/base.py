"""Insert any method: what all kinds of it have in common. Each kind has a pass class of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import fx

from adaptc.errors import DefinitionError, Fault, InputError, Refusal
from adaptc.ir.adaptation import Adaptation, OnAlias
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION
from adaptc.ir.selection import Selection, Target, as_stored, select
from adaptc.methods.method import METHODS, Method, shared_name
from adaptc.methods.param import Param
from adaptc.methods.point_sites import InputSite, Site
from adaptc.methods.site import WeightSite
from adaptc.methods.trial import try_pending
from adaptc.registry.author import place_of_function
from adaptc.registry.calls import blamed, read_only
from adaptc.rewriter.expression import extract_expression, trace_expression
from adaptc.rewriter.pipeline import Pass, changed_options
from adaptc.weights import Deferred, Weight, initial, seeded

M = TypeVar("M", bound=Method[Any])


@dataclass(frozen=True)
class Insert(Pass, Generic[M]):
    """Put a method in at every site the target names: `Insert(method, target="*.query")`.

    What is made is of the subclass for the method's kind, which says how.

    Attributes:
        method: the method, with its options.
        target: which sites, as in a spec.
        exclude: patterns of modules to leave out.
        adapter: the adapter's name.
        entry: the number of the entry of the spec that it comes from.
        seed: what random numbers it starts from depend on.
        on_alias: what to do where the weight is used elsewhere too: give the site its own, stay live when the rest is
            folded, change it everywhere, or refuse to fold.
        as_stored: parameters named by themselves are (out, in) as they are stored, however the model multiplies.
        trained: it comes from a checkpoint, and is taken as it is: a rank above the layer's size wastes, but is right.

    Raises:
        TypeError: the method is none, or is not registered.
        DefinitionError: the method was registered before torch was imported, and has a mistake.
    """

    method: M
    target: Target = ()
    exclude: tuple[str, ...] = ()
    adapter: str = "default"
    entry: int = 0
    seed: int = 0
    on_alias: OnAlias = "refuse"
    as_stored: bool = False
    trained: bool = False

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted"})
    leaves: ClassVar[str | None] = "adapted"
    changes_results: ClassVar[bool] = True

    def __init_subclass__(cls, inserts: type[Method[Any]]) -> None:
        """A class for a kind of method."""
        super().__init_subclass__()
        _engines[inserts] = cls

    def __new__(cls, method: M | None = None, *_: Any, **__: Any) -> Self:
        """The pass of the class for the method's kind."""
        if cls is not Insert:
            return super().__new__(cls)
        engine: Any = next((engine for kind, engine in _engines.items() if isinstance(method, kind)), None)
        if engine is None:
            raise TypeError(f"expected a method such as {next(iter(METHODS)).title()}(), got {method!r}")
        return super().__new__(engine)

    def __post_init__(self) -> None:
        if not hasattr(self.method, "name"):
            cls = type(self.method)
            raise TypeError(f"{cls.__name__} is not registered: write @method(...) above its class")
        try_pending(type(self.method))

    @property
    def name(self) -> str:  # type: ignore[override]
        """What a spec calls the pass, such as `insert-` and the method's name."""
        return f"insert-{self.method.name}"

    def stated(self) -> dict[str, Any]:
        """The options of the pass and of the method that differ from their defaults, as a spec states them."""
        options = {name: value for name, value in changed_options(self).items() if name != "method"}
        return options | changed_options(self.method)

    def selection(self, graph: Graph) -> Selection[Any]:
        """What the target matches in this graph."""
        found = select(graph, self.target, self.exclude, self.method)
        if not self.as_stored:
            return found
        sites = (as_stored(s, graph) if isinstance(s, WeightSite) else s for s in found.sites)
        return dataclasses.replace(found, sites=tuple(sites))

    def refused(self, site: Any) -> Fault | None:
        """The option at fault and why this cannot be inserted at a site; None if it can."""
        fault = self._called("refuses", site)
        return fault or (None if self.trained else self._called("refuses_to_train", site))

    def _called(self, hook: str, site: Site) -> Fault | None:
        function = getattr(self.method, hook)
        with blamed("method", self.method.name, function, hook, str(site)):
            fault = function(site)
        if fault is not None and not isinstance(fault, Fault):
            raise DefinitionError(
                f"method {self.method.name!r}: {hook} gives a Fault or None, got {fault!r}",
                place_of_function(function),
            )
        return fault

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
                refusals.append(Refusal(f"{method.name}: {reason.reason}", (site.node,), (f"site {site}",)))
                continue
            if any(name in graph.weights for name, _ in self.tensors(site, selection.sites).values()):
                refusals.append(
                    Refusal(
                        f"{method.name}: the adapter {self.adapter!r} sits on {site.module} already; "
                        "give this entry another `name`",
                        (site.node,),
                    )
                )
        return refusals

    def tensors(self, site: Site, sites: Sequence[Site]) -> dict[str, tuple[str, Param]]:
        """Argument of the expression -> name in the graph and tensor: a site's own, and what all sites share."""
        with blamed("method", self.method.name, self.method.at, "at", str(site)):
            method = self.method.at(site)
        with blamed("method", method.name, method.params, "params", str(site)):
            own = method.stored(site)
        with blamed("method", method.name, method.shared, "shared"):
            shared = method.shared(sites)
        named = {k: (parameter_name(site, method, self.adapter, p), p) for k, p in own.items()}
        return named | {k: (shared_name(self.adapter, p.key), p) for k, p in shared.items()}

    def ensures(self, graph: Graph) -> str | None:
        """Every planned site was rewritten."""
        planned = {str(site) for site in self.selection(graph).sites}
        rewritten = {str(a.site) for a in graph.adaptations if a.entry == self.entry}
        left = planned - rewritten
        return f"{self.name} planned {', '.join(sorted(left))}, but did not rewrite it" if left else None

    def traced(
        self, method: M, hook: str, site: Site, expression: Callable[..., torch.Tensor], operands: Sequence[Any],
        theta: Mapping[str, Any], whole: bool = False,
    ) -> fx.Graph:  # fmt: skip
        """A method's expression as a graph; `expression` calls the method's `hook`, which must not write to anything.

        Raises:
            DefinitionError: it cannot be traced, or changes what it is given in place; names the author's line.
        """
        names = type(method).expressions[hook]

        def guarded(*given: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
            return read_only(expression, names, given, tensors)

        with blamed("method", method.name, getattr(method, hook), hook, str(site)):
            return trace_expression(guarded, operands, theta, whole)

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
            W = so_far() if so_far is not None else None
            if W is not None and isinstance(site, WeightSite):
                W = site.matrix(W)
            if each == param.shape:
                made = one(W, generator)
            else:
                made = torch.stack([one(None if W is None else W[i], generator) for i in range(batch or 0)])
            return made.to(dtype).clone()

        return Deferred(param.shape, dtype, make)

    def _starting_point(self, graph: Graph, site: Site, value: fx.Node) -> Callable[[], torch.Tensor]:
        """What functions that initialise get: the weight so far, its Fisher information, or what it has lost."""
        if self.method.compensates:
            return graph.quantized[site.parameter].quantization.lost
        if not self.method.calibrated:
            return extract_expression(graph, value).evaluate

        def estimated() -> torch.Tensor:
            if graph.fisher_information is None:
                raise InputError(f"{self.method.name} chooses by data: give it `calibration`")
            return graph.fisher_information(site.parameter)

        return estimated


_engines: dict[type[Method[Any]], type[Insert[Any]]] = {}


def parameter_name(site: Site, method: Method, adapter: str, param: Param) -> str:
    """The full name of a parameter: PEFT's own, `module.lora_A.default.weight`, where its key is free."""
    first, dot, rest = param.key.partition(".")
    if isinstance(site, WeightSite | InputSite) and first == site.leaf:
        first, dot, rest = method.name.replace("-", "_"), ".", param.key
    first += f"_{site.part}" if site.part else ""
    return ".".join(part for part in (site.module, first, adapter) if part) + (dot + rest if rest else "")
