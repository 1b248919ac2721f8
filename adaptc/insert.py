"""Insert any weight method: its expression goes in front of every chosen site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.expression import Traced, cut, splice, trace_expression
from adaptc.graph import Adaptation, Graph
from adaptc.method import Method, Param, WeightMethod
from adaptc.pipeline import Pass
from adaptc.select import Selection, Target, select
from adaptc.sites import Site, Use
from adaptc.weights import Computed, Weight, initial, seeded


@dataclass(frozen=True)
class Insert(Pass):
    """`linear(x, W, b)` becomes `linear(x, E(W, θ), E(b, θ))` at every site the target names."""

    target: Target = ()
    exclude: tuple[str, ...] = ()
    adapter: str = "default"
    entry: int = 0
    seed: int = 0
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
        return select(graph, self.target, self.exclude, self.method)

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target matches, the method can sit there, and the adapter's names are free."""
        method, selection = self.method, self.selection(graph)
        if not selection.sites:
            near = f"; near: {', '.join(selection.near)}" if selection.near else ""
            return [Refusal(f"{self.name}: the target {self.target!r} matches no site{near}")]
        refusals = []
        for site in selection.sites:
            here = method.at(site)
            reason = None if self.trained else method.refuses(site)
            if reason:
                refusals.append(Refusal(f"{method.name}: {reason[1]}\n  site {site}", (site.uses[0].node,)))
                continue
            taken = [
                n
                for n in (parameter_name(site, here, self.adapter, p) for p in here.params(site).values())
                if n in graph.weights
            ]
            if taken:
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
        method = self.method
        traced: dict[Any, Traced] = {}
        nodes = graph.by_name()
        for site in self.selection(graph).sites:
            self._insert(graph, site, method.at(site), traced, nodes)
        return True

    def ensures(self, graph: Graph) -> str | None:
        """Every planned site was rewritten."""
        planned = {site.parameter for site in self.selection(graph).sites}
        rewritten = {a.site.parameter for a in graph.adaptations if a.entry == self.entry}
        left = planned - rewritten
        return f"{self.name} planned {', '.join(sorted(left))}, but did not rewrite it" if left else None

    def _insert(
        self,
        graph: Graph,
        site: Site,
        method: WeightMethod,
        traced: dict[Any, Traced],
        nodes: dict[str, fx.Node],
    ) -> None:
        value = graph.value_of(site.parameter, site.uses, nodes)
        named: dict[str, tuple[str, Param]] = {}
        theta: dict[str, fx.Node] = {}
        for argument, param in method.params(site).items():
            name = parameter_name(site, method, self.adapter, param)
            graph.attach(name, self._initial(graph, name, param, site, value))
            theta[argument] = graph.parameter_node(name)
            named[argument] = (name, param)
        tag = len(graph.adaptations)
        graph.adaptations.append(Adaptation(site, method, self.method, self.adapter, self.entry, named))

        def weight(W: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
            return site.view(method.weight(site.view(W), **values))

        targets: list[tuple[tuple[Use, ...], Callable[..., torch.Tensor], str]] = [
            (site.uses, weight, site.parameter)
        ]
        if site.bias is not None and method.adapts_bias():
            targets.append((site.bias_uses, method.bias, site.bias))
        for uses, function, parameter in targets:
            before = graph.value_of(parameter, uses, nodes)
            key = (
                repr(method),
                function.__name__,
                site.transposed,
                tuple(before.meta["val"].shape),
                str(site.dtype),
            )
            if key not in traced:
                with graph.fake_mode:
                    traced[key] = trace_expression(
                        function, before.meta["val"], {k: n.meta["val"] for k, n in theta.items()}
                    )
            result = splice(graph, traced[key], before, theta, nodes[uses[0].node], tag)
            got, want = result.meta["val"], before.meta["val"]
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ValueError(f"{method.name}.{function.__name__} makes {got} of {want} on {site}")
            if (parameter, uses[0].node) in graph.adapted and not _depends(result, before):
                words = f"{method.name} replaces what an earlier entry does to {site.module}; write it first"
                raise RefusedError([Refusal(words, (uses[0].node,))], self)
            for use in uses:
                nodes[use.node].replace_input_with(before, result)
            nodes[result.name] = result
            graph.adapted[parameter, uses[0].node] = result.name

    def _initial(self, graph: Graph, name: str, param: Param, site: Site, value: fx.Node) -> Weight:
        init, seed = param.init, self.seed
        if isinstance(init, str):
            kind = init
            return Computed(
                param.shape, site.dtype, lambda: initial(kind, param.shape, seeded(seed, name)).to(site.dtype)
            )
        so_far, function = cut(graph, value), init

        def make() -> torch.Tensor:
            W = site.view(so_far.evaluate())
            return function(W, seeded(seed, name)).to(site.dtype).clone()

        return Computed(param.shape, site.dtype, make)


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
    return ".".join(part for part in (site.module, first, adapter) if part) + (dot + rest if rest else "")


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
