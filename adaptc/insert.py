"""Insert any weight method: its expression goes in front of every chosen site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.aliases import OnAlias, untie, widened
from adaptc.errors import InputError, Refusal, RefusedError
from adaptc.expression import Traced, cut, splice, trace_expression
from adaptc.graph import Adaptation, Graph
from adaptc.method import Method, Param, WeightMethod
from adaptc.peft_keys import as_stored
from adaptc.pipeline import Pass
from adaptc.select import Selection, Target, select
from adaptc.sites import Site
from adaptc.weights import Computed, Weight, initial, seeded


@dataclass(frozen=True)
class Insert(Pass):
    """`linear(x, W, b)` becomes `linear(x, E(W, θ), E(b, θ))` at every site the target names."""

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
    method_class: ClassVar[type[WeightMethod]]

    @property
    def method(self) -> WeightMethod:
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
        method = self.method.at(site)
        if site.computed_bias and method.adapts_bias():
            return (
                (),
                "the bias here is computed from other parameters, so it cannot be adapted with the weight",
            )
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

    def call(self, graph: Graph) -> bool:
        """Splice the expression at every site."""
        method, sites = self.method, self.selection(graph).sites
        traced: dict[Any, Traced] = {}
        nodes = graph.by_name()
        for site in sites:
            self._insert(graph, site, method.at(site), self.tensors(site, sites), traced, nodes)
        return True

    def tensors(self, site: Site, sites: Sequence[Site]) -> dict[str, tuple[str, Param]]:
        """Argument of the expression -> name in the graph and tensor: a site's own, and what all sites share."""
        method = self.method.at(site)
        own = {k: (parameter_name(site, method, self.adapter, p), p) for k, p in method.stored(site).items()}
        return own | {k: (shared_name(self.adapter, p), p) for k, p in method.shared(sites).items()}

    def ensures(self, graph: Graph) -> str | None:
        """Every planned site was rewritten."""
        planned = {str(site) for site in self.selection(graph).sites}
        rewritten = {str(a.site) for a in graph.adaptations if a.entry == self.entry}
        left = planned - rewritten
        return f"{self.name} planned {', '.join(sorted(left))}, but did not rewrite it" if left else None

    def _insert(
        self,
        graph: Graph,
        site: Site,
        method: WeightMethod,
        named: dict[str, tuple[str, Param]],
        traced: dict[Any, Traced],
        nodes: dict[str, fx.Node],
    ) -> None:
        if self.on_alias == "untie":
            site = untie(graph, site, nodes, bias=method.adapts_bias())
        if self.on_alias == "share":
            site = widened(graph, site)
        own = method.stored(site)
        derived = any(not param.stored for _, param in named.values())
        # What is computed again on loading starts from the base, whatever earlier entries will have learned.
        value = (
            graph.parameter_node(site.parameter)
            if derived
            else graph.value_of(site.parameter, site.uses, nodes)
        )
        theta: dict[str, fx.Node] = {}
        for argument, (name, param) in named.items():
            if name not in graph.weights:  # of what sites share, the first makes it
                weight = self._initial(graph, name, param, site, value, argument in own)
                graph.attach(name, weight, param.trained, param.stored)
            theta[argument] = graph.parameter_node(name)
        params = {argument: param for argument, (_, param) in named.items()}
        tag = len(graph.adaptations)
        graph.adaptations.append(
            Adaptation(site, method, self.method, self.adapter, self.entry, named, self.on_alias)
        )
        targets = [(site.uses, _weight_of(method, site, params, own), site.parameter)]
        if site.bias is not None and method.adapts_bias():
            targets.append((site.bias_uses, _bias_of(method, site, params), site.bias))
        for uses, function, parameter in targets:
            before = graph.value_of(parameter, uses, nodes)
            values = {argument: node.meta["val"] for argument, node in theta.items()}
            shapes = tuple(tuple(value.shape) for value in (before.meta["val"], *values.values()))
            key = (repr(method), function.__name__, site.layout, site.rows, shapes, str(site.dtype))
            if key not in traced:
                with graph.fake_mode:
                    traced[key] = trace_expression(function, before.meta["val"], values)
            result = splice(graph, traced[key], before, theta, nodes[uses[0].node], tag)
            got, want = result.meta["val"], before.meta["val"]
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ValueError(f"{method.name}.{function.__name__} makes {got} of {want} on {site}")
            if (parameter, uses[0].node) in graph.adapted and not _depends(result, before):
                words = f"{method.name} replaces what an earlier entry does to {site.module}; write it first"
                raise RefusedError([Refusal(words, (uses[0].node,))], self)
            if got.stride() == want.stride():  # then what reads it needs no other check than before
                result.meta["val"] = want
            for use in uses:
                nodes[use.node].replace_input_with(before, result)
                graph.adapted[parameter, use.node] = result.name
            nodes[result.name] = result

    def _initial(
        self, graph: Graph, name: str, param: Param, site: Site, value: fx.Node, own: bool
    ) -> Weight:
        init, seed, batch = param.init, self.seed, site.batch if own else None
        each = param.shape[1:] if batch is not None and param.unpack is None else param.shape
        so_far = None if isinstance(init, str) else self._starting_point(graph, site, value)
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
        """What functions that initialise get: the weight so far, or its Fisher information."""
        if not self.method.calibrated:
            return cut(graph, value).evaluate

        def estimated() -> torch.Tensor:
            if graph.information is None:
                raise InputError(f"{self.method.name} chooses by data: give it `calibration`")
            return graph.information(site.parameter)

        return estimated


def _unpacked(params: Mapping[str, Param], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    unpack = {argument: param.unpack for argument, param in params.items()}
    return {a: call(v) if (call := unpack[a]) is not None else v for a, v in values.items()}


def _weight_of(
    method: WeightMethod, site: Site, params: Mapping[str, Param], own: Collection[str]
) -> Callable[..., torch.Tensor]:
    """The method's expression on the stored weight: each of its matrices in turn, or the rows of a slice."""

    def one(W: torch.Tensor, theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return method.weight(W, **theta)

    each = (0, {argument: 0 if argument in own else None for argument in params})
    expression = torch.vmap(one, each) if site.batch is not None else one

    def weight(W: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.restored(expression(site.matrix(W), _unpacked(params, values)), W)

    return weight


def _bias_of(method: WeightMethod, site: Site, params: Mapping[str, Param]) -> Callable[..., torch.Tensor]:
    def bias(b: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.bias_restored(method.bias(site.bias_of(b), **_unpacked(params, values)), b)

    return bias


def _depends(result: fx.Node, value: fx.Node) -> bool:
    queue, seen = [result], {result}
    while queue:
        node = queue.pop()
        if node is value:
            return True
        new = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(new)
        queue += new
    return False


def parameter_name(site: Site, method: Method, adapter: str, param: Param) -> str:
    """The full name of a parameter: PEFT's own, `module.lora_A.default.weight`, where its key is free."""
    first, dot, rest = param.key.partition(".")
    if first == site.leaf:
        first, dot, rest = method.name.replace("-", "_"), ".", param.key
    first += f"_{site.part}" if site.part else ""
    return ".".join(part for part in (site.module, first, adapter) if part) + (dot + rest if rest else "")


def shared_name(adapter: str, param: Param) -> str:
    """The full name of a tensor that all sites of an adapter share: `vera_A.default`."""
    first, dot, rest = param.key.partition(".")
    return f"{first}.{adapter}{dot}{rest}"


def insert_pass(cls: type[Method]) -> type[Insert]:
    """The pass that inserts a method: `InsertLora`, called `insert-lora` in a spec."""
    fields: list[Any] = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        factory = f.default_factory
        fields.append(
            (
                f.name,
                Any,
                dataclasses.field(default_factory=factory)
                if factory is not dataclasses.MISSING
                else dataclasses.field(default=f.default),
            )
        )
    name = "Insert" + "".join(part.capitalize() for part in cls.name.split("-"))
    made = dataclasses.make_dataclass(name, fields, bases=(Insert,), frozen=True)
    made.method_class, made.name, made.__doc__, made.__module__ = (
        cls,
        f"insert-{cls.name}",
        cls.__doc__,
        cls.__module__,
    )
    return made
