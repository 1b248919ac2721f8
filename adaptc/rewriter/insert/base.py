"""Insert any method: what the engines for the kinds of method have in common."""

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
from adaptc.methods.trial import TRIALS
from adaptc.patterns import matches_any
from adaptc.registry.author import place_of_function
from adaptc.registry.calls import blamed, read_only
from adaptc.rewriter.expression import extract_expression, trace_expression
from adaptc.rewriter.pipeline import Pass, changed_options
from adaptc.weights import Deferred, Weight, initial, seeded

M = TypeVar("M", bound=Method[Any])
"""The kind of method that an engine inserts."""
S = TypeVar("S", bound=Site)
"""The kind of site that such a method sits on."""

_engines: dict[type[Method[Any]], type[Insert[Any, Any]]] = {}
"""Kind of method -> its engine, the subclass of `Insert` that inserts it. Each engine enters itself when its module is
imported: `Insert` cannot name them, since their modules import this one. `catalog` imports them all."""


@dataclass(frozen=True)
class Insert(Pass, Generic[M, S]):
    """Insert a method at every site the target names: `Insert(method, target="*.query")`.

    The object is of the engine for the method's kind, one of the subclasses, which knows how to insert it.

    Attributes:
        method: the method, with its options.
        target: which sites, as in a spec.
        exclude: patterns of modules to leave out.
        adapter: the adapter's name.
        entry: the number of the spec's entry that it comes from.
        seed: of the random numbers that its tensors start with.
        on_alias: what to do where the weight is used elsewhere too: `untie` gives the site a weight of its own, `live`
            leaves it out of a fold, `share` changes it everywhere, `refuse` refuses to fold.
        as_stored: patterns of parameters that are (out, in) as they are stored, however the model multiplies.
        trained: it comes from a checkpoint, so what makes no sense to train, such as a rank above the layer's size, is
            taken as it is.
        every: it is on every site of its kinds that the target names, whatever the method's `takes` says.

    Raises:
        TypeError: this is not a method, or its class is not registered.
        DefinitionError: the method was registered before torch was imported, and has a mistake.
    """

    method: M
    target: Target = ()
    exclude: tuple[str, ...] = ()
    adapter: str = "default"
    entry: int = 0
    seed: int = 0
    on_alias: OnAlias = "refuse"
    as_stored: tuple[str, ...] = ()
    trained: bool = False
    every: bool = False

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted"})
    leaves: ClassVar[str | None] = "adapted"
    changes_results: ClassVar[bool] = True

    def __init_subclass__(cls, inserts: type[Method[Any]]) -> None:
        """Enter an engine for a kind of method."""
        super().__init_subclass__()
        _engines[inserts] = cls

    def __new__(cls, method: M | None = None, *_: Any, **__: Any) -> Self:
        """An object of the engine for the method's kind."""
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
        TRIALS.try_pending(type(self.method))

    @property
    def name(self) -> str:  # type: ignore[override]
        """What a spec calls the pass, such as `insert-` and the method's name."""
        return f"insert-{self.method.name}"

    def stated(self) -> dict[str, Any]:
        """The options of the pass and of the method that differ from their defaults, as a spec states them."""
        options = {name: value for name, value in changed_options(self).items() if name != "method"}
        return options | changed_options(self.method)

    def selection(self, graph: Graph) -> Selection[S]:
        """The sites that the target matches in this graph."""
        selection = select(graph, self.target, self.exclude, self.method, self.every)
        if not self.as_stored:
            return selection
        sites = (
            as_stored(dataclasses.replace(site, named=True), graph)
            if isinstance(site, WeightSite) and matches_any(self.as_stored, site.name)
            else site
            for site in selection.sites
        )
        return dataclasses.replace(selection, sites=tuple(sites))

    def refused(self, site: S) -> Fault | None:
        """The option at fault and why the method cannot be inserted at a site; None if it can."""
        fault = self._called("refuses", site)
        return fault or (None if self.trained else self._called("refuses_to_train", site))

    def _called(self, hook: str, site: S) -> Fault | None:
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
        """The target matches, the method can sit on every site, and the names of its tensors are free."""
        method, selection = self.method, self.selection(graph)
        if not selection.sites:
            near = f"; near: {', '.join(selection.near)}" if selection.near else ""
            return [Refusal(f"{self.name}: the target {self.target!r} matches no site{near}")]
        refusals: list[Refusal] = []
        for site in selection.sites:
            fault = self.refused(site)
            if fault:
                refusals.append(
                    Refusal(f"{method.name}: {fault.reason}", (site.node,), (f"site {site}", *fault.advice))
                )
                continue
            if any(name in graph.weights for name, _ in self.tensors(site, selection.sites).values()):
                reason = (
                    f"{method.name}: the adapter {self.adapter!r} sits on {site.module} already; "
                    "give this entry another `name`"
                )
                refusals.append(Refusal(reason, (site.node,)))
        return refusals

    def tensors(self, site: S, sites: Sequence[S]) -> dict[str, tuple[str, Param]]:
        """The tensors of a site, its own and those that all `sites` share.

        Returns:
            Argument of the method's expression -> (name in the graph, the parameter as the method states it).
        """
        with blamed("method", self.method.name, self.method.at, "at", str(site)):
            method = self.method.at(site)
        with blamed("method", method.name, method.params, "params", str(site)):
            params = method.stored(site)
        with blamed("method", method.name, method.shared, "shared"):
            shared = method.shared(sites)
        tensors = {k: (parameter_name(site, method, self.adapter, p), p) for k, p in params.items()}
        return tensors | {k: (shared_name(self.adapter, p.key), p) for k, p in shared.items()}

    def ensures(self, graph: Graph) -> str | None:
        """Every planned site was rewritten."""
        planned = {str(site) for site in self.selection(graph).sites}
        rewritten = {str(a.site) for a in graph.adaptations if a.entry == self.entry}
        remaining = sorted(planned - rewritten)
        return f"{self.name} planned {', '.join(remaining)}, but did not rewrite it" if remaining else None

    def traced(
        self, method: M, hook: str, site: S, expression: Callable[..., torch.Tensor], operands: Sequence[object],
        theta: Mapping[str, object], whole: bool = False,
    ) -> fx.Graph:  # fmt: skip
        """A method's expression as a graph; `expression` calls the method's `hook`, which may not write to arguments.

        Raises:
            DefinitionError: it cannot be traced, or writes to its arguments; names the author's line.
        """
        names = type(method).expressions[hook]

        def guarded(*given: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
            return read_only(expression, names, given, tensors)

        with blamed("method", method.name, getattr(method, hook), hook, str(site)):
            return trace_expression(guarded, operands, theta, whole)

    def attached(
        self, graph: Graph, site: S, tensors: Mapping[str, tuple[str, Param]], value: fx.Node | None
    ) -> dict[str, fx.Node]:
        """Attach a site's tensors to the graph; one that all sites share is attached with the first of them.

        Args:
            graph: the host.
            site: the site.
            tensors: as `Insert.tensors` gives them.
            value: the node of the weight, which initial values may depend on; None at a site without one.

        Returns:
            Argument of the method's expression -> the node that reads the tensor.
        """
        params = self.method.at(site).stored(site)
        for argument, (name, param) in tensors.items():
            if name not in graph.weights:
                weight = self._initial(graph, name, param, site, value, argument not in params)
                graph.attach(name, weight, param.trained, param.stored)
        return {argument: graph.parameter_node(name) for argument, (name, _) in tensors.items()}

    def recorded(
        self, graph: Graph, site: S, tensors: Mapping[str, tuple[str, Param]]
    ) -> dict[str, Adaptation]:
        """Record that a site is adapted; gives what the meta of each node inserted for it holds."""
        method = self.method.at(site)
        adaptation = Adaptation(site, method, self.method, self.adapter, self.entry, tensors, self.on_alias)
        graph.adaptations.append(adaptation)
        return {ADAPTATION: adaptation}

    def _initial(
        self, graph: Graph, name: str, param: Param, site: S, value: fx.Node | None, shared: bool
    ) -> Weight:
        """The initial value of a tensor; where the site holds several matrices, one for each unless it is shared."""
        init, seed, batch = param.init, self.seed, None if shared else site.batch
        each = param.shape[1:] if batch is not None and param.unpack is None else param.shape
        argument = None if isinstance(init, str) or value is None else self._init_argument(graph, site, value)
        dtype = site.dtype if param.below is None else torch.int64

        def one(W: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
            if isinstance(init, str):
                return initial(init, each, generator)
            assert W is not None
            return init(W, generator).reshape(each)

        def make() -> torch.Tensor:
            generator = seeded(seed, name)
            tensor = argument() if argument is not None else None
            W = site.matrix(tensor) if tensor is not None and isinstance(site, WeightSite) else tensor
            if each == param.shape:
                result = one(W, generator)
            else:
                result = torch.stack([one(None if W is None else W[i], generator) for i in range(batch or 0)])
            return result.to(dtype).clone()

        return Deferred(param.shape, dtype, make)

    def _init_argument(self, graph: Graph, site: S, value: fx.Node) -> Callable[[], torch.Tensor]:
        """Gives what the method's initialisation depends on, in the weight's shape.

        That is the weight with earlier entries applied, its Fisher information where the method is `calibrated`, or
        the residual of its quantization where the method `compensates`.
        """
        if self.method.compensates:
            return graph.quantized[site.parameter].quantization.residual
        if not self.method.calibrated:
            return extract_expression(graph, value).evaluate

        def estimated() -> torch.Tensor:
            if graph.fisher_information is None:
                raise InputError(f"{self.method.name} chooses by data: give it `calibration`")
            return graph.fisher_information(site.parameter)

        return estimated


def parameter_name(site: Site, method: Method[Any], adapter: str, param: Param) -> str:
    """The full name of a parameter: PEFT's own, `module.lora_A.default.weight`.

    A key that begins with the name of the site's weight would hide it: then the method's name goes in front.
    """
    first, dot, rest = param.key.partition(".")
    if isinstance(site, WeightSite | InputSite) and first == site.leaf:
        first, dot, rest = method.name.replace("-", "_"), ".", param.key
    first += f"_{site.part}" if site.part else ""
    return ".".join(part for part in (site.module, first, adapter) if part) + (dot + rest if rest else "")
