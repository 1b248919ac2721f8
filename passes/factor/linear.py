"""Factor: `linear` distributes over the weight's expression, so that no adapted weight is ever built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.graph import Graph
from adaptc.pipeline import Pass, graph_pass
from adaptc.sites import LINEAR_FORMS
from adaptc.tracing.modes import training_node

aten = torch.ops.aten
SCALES = {aten.mul.Tensor, aten.div.Tensor}
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}


@graph_pass("factor")
@dataclass(frozen=True)
class Factor(Pass):
    """linear(x, U + V) = linear(x, U) + linear(x, V);  linear(x, P Q) = linear(linear(x, Q), P);
    a scale of rows scales the output, a scale of columns the input, a scalar the narrowest side.

    It stops where building the product costs less than two thin ones would, for `tokens` rows of x: forward
    and backward, 6 t r (in + out) against 2 t in out + 6 r in out operations. Branch dropout goes on the input of every
    term without the base weight.
    """

    tokens: int = 1024

    takes: ClassVar[frozenset[str]] = frozenset({"adapted", "quantized"})
    leaves: ClassVar[str | None] = "factored"

    def call(self, graph: Graph) -> bool:
        """Rewrite every adapted matrix product."""
        nodes = graph.by_name()
        changed = False
        placed: set[int] = set()
        done: set[str] = set()
        for adaptation in graph.adaptations:
            site = adaptation.site
            if site.kind != "linear":
                continue
            for use in site.uses:
                node = nodes[use.node]
                if use.node not in done and node.args[LINEAR_FORMS[node.target].weight].op != "get_attr":  # type: ignore[union-attr]
                    done.add(use.node)
                    rewrite = _Rewrite(graph, node, self.tokens)
                    rewrite.run()
                    placed |= rewrite.placed
                    changed = True
        _refuse_lost_dropout(graph, placed, self)
        return changed


@dataclass
class _Rewrite:
    """One matrix product `x E^T + b` taken apart."""

    graph: Graph
    node: fx.Node
    tokens: int
    dropped: dict[tuple[int, fx.Node], fx.Node] = field(default_factory=dict)
    placed: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Emit the factored form in front of the node, and let its users read that."""
        form = LINEAR_FORMS[self.node.target]
        x, weight = self.node.args[form.input], self.node.args[form.weight]
        bias = (
            self.node.args[form.bias] if form.bias is not None and len(self.node.args) > form.bias else None
        )
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        with self.graph.module.graph.inserting_before(self.node):
            result = self.apply(x, weight, flipped=form.transposed, bias=bias)
        self.node.replace_all_uses_with(result)
        self.graph.module.graph.erase_node(self.node)

    def apply(self, x: fx.Node, E: fx.Node, flipped: bool, bias: Any = None) -> fx.Node:
        """`x E^T + b` for E (out, in), or `x E + b` where E is stored `(in, out)`: `flipped`."""
        args = E.args
        if E.target in TRANSPOSES and E.meta.get("adaptation") is not None:
            return self.apply(x, args[0], not flipped, bias)  # type: ignore[arg-type]
        if E.meta.get("adaptation") is None:  # a parameter, of the base or of the method
            return self.product(x, E, flipped, bias)
        if E.target is aten.add.Tensor and not E.kwargs and all(_same_shape(a, E) for a in args):
            terms = sorted(args, key=lambda a: not self.holds_base(a, E.meta["adaptation"]))  # type: ignore[arg-type]
            if not self.gains(E, terms[1]):  # type: ignore[arg-type]
                return self.product(x, E, flipped, bias)
            first = self.apply(x, terms[0], flipped, bias)  # type: ignore[arg-type]
            second = self.apply(self.drop(x, E, terms[1]), terms[1], flipped)  # type: ignore[arg-type]
            return self.emit(aten.add.Tensor, first, second)
        if E.target in SCALES:
            scaled = self.scaled(x, E, flipped, bias)
            if scaled is not None:
                return scaled
        if E.target is aten.mm.default and self.worth(E):
            outer, inner = (args[1], args[0]) if flipped else (args[0], args[1])
            return self.apply(self.apply(x, inner, flipped), outer, flipped, bias)  # type: ignore[arg-type]
        return self.product(x, E, flipped, bias)

    def scaled(self, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node | None:
        """A product or quotient of a matrix and a scalar, or a vector along one side; None if it is neither."""
        matrix, scale = E.args[0], E.args[1]
        if isinstance(scale, fx.Node) and not _same_shape(matrix, E) and E.target is aten.mul.Tensor:
            matrix, scale = scale, matrix
        if not isinstance(matrix, fx.Node) or not _same_shape(matrix, E):
            return None
        if not isinstance(scale, fx.Node):
            if matrix.target is aten.mm.default and self.worth(
                matrix
            ):  # the narrowest place is between the two
                outer, inner = (1, 0) if flipped else (0, 1)
                narrow = self.apply(x, matrix.args[inner], flipped)  # type: ignore[arg-type]
                return self.apply(self.emit(E.target, narrow, scale), matrix.args[outer], flipped, bias)  # type: ignore[arg-type]
            return self.biased(self.emit(E.target, self.apply(x, matrix, flipped), scale), bias)
        rows, columns = E.meta["val"].shape
        shape = tuple(scale.meta["val"].shape)
        along_out, along_in = ((1, columns), (rows, 1)) if flipped else ((rows, 1), (1, columns))
        if shape == along_out or (flipped and shape == (columns,)):
            flat = self.emit(aten.reshape.default, scale, [-1])
            return self.biased(self.emit(E.target, self.apply(x, matrix, flipped), flat), bias)
        if shape == along_in or (not flipped and shape == (columns,)):
            flat = self.emit(aten.reshape.default, scale, [-1])
            return self.apply(self.emit(E.target, x, flat), matrix, flipped, bias)
        return None

    def product(self, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """The matrix product itself, spelled as the base spells it where the weight lies that way."""
        if not flipped:
            return self.emit(aten.linear.default, x, E, *([] if bias is None else [bias]))
        if bias is not None and x.meta["val"].dim() == 2:
            return self.emit(aten.addmm.default, bias, x, E)
        return self.biased(self.emit(aten.matmul.default, x, E), bias)

    def biased(self, y: fx.Node, bias: Any) -> fx.Node:
        """`y + b`."""
        return y if bias is None else self.emit(aten.add.Tensor, y, bias)

    def drop(self, x: fx.Node, E: fx.Node, term: fx.Node) -> fx.Node:
        """x behind the dropout of the method that wrote this sum, for a term without the base weight."""
        tag = E.meta["adaptation"]
        p = self.graph.adaptations[tag].method.dropout
        if (
            not p
            or self.holds_base(term, tag)
            or (tag, x) in {(t, node) for (t, _), node in self.dropped.items()}
        ):
            return x
        self.placed.add(tag)
        if (tag, x) not in self.dropped:
            self.dropped[tag, x] = self.emit(
                aten.dropout.default, x, p, training_node(self.graph.module.graph)
            )
        return self.dropped[tag, x]

    def gains(self, E: fx.Node, term: fx.Node) -> bool:
        """Whether a term of the sum E is better kept apart: it has dropout of its own, or is thin."""
        tag = E.meta["adaptation"]
        if self.graph.adaptations[tag].method.dropout and not self.holds_base(term, tag):
            return True
        while term.target in SCALES and not isinstance(term.args[1], fx.Node):
            term = term.args[0]  # type: ignore[assignment]
        return term.target is aten.mm.default and self.worth(term)

    def worth(self, E: fx.Node) -> bool:
        """Whether two thin products cost less than building the full one, forward and backward."""
        (rows, inner), (_, columns) = (a.meta["val"].shape for a in E.args)  # type: ignore[union-attr]
        thin = 6 * self.tokens * inner * (rows + columns)
        return thin <= 2 * self.tokens * rows * columns + 6 * inner * rows * columns

    def holds_base(self, E: fx.Node, tag: int) -> bool:
        """Whether what the method adapts is inside this term: any weight that is not its own parameter."""
        own = {name for name, _ in self.graph.adaptations[tag].params.values()}
        queue = [E]
        while queue:
            node = queue.pop()
            if node.op == "get_attr" and node.target not in own:
                return True
            queue.extend(node.all_input_nodes)
        return False

    def emit(self, target: Any, *args: Any) -> fx.Node:
        """One operation, recorded as coming from the base's node."""
        return self.graph.call(target, *args, like=self.node)


def _same_shape(value: Any, E: fx.Node) -> bool:
    return isinstance(value, fx.Node) and tuple(value.meta["val"].shape) == tuple(E.meta["val"].shape)


def _refuse_lost_dropout(graph: Graph, placed: set[int], source: Pass) -> None:
    for tag, adaptation in enumerate(graph.adaptations):
        if adaptation.method.dropout and tag not in placed:
            words = (
                f"{adaptation.method.name} on {adaptation.site.module} has dropout, but its weight is no sum with a "
                "term of its own that dropout could go in front of"
            )
            raise RefusedError([Refusal(words, (adaptation.site.uses[0].node,))], source)
