"""Factor: a product distributes over its weight's expression, so that no adapted weight is ever built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.analysis.affine_maps import RESHAPES, AffineMap, Linear, as_affine_map
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION
from adaptc.ir.training_mode import training_node
from adaptc.methods.method import WeightMethod
from adaptc.rewriter.pipeline import Pass, graph_pass

aten = torch.ops.aten
SCALES = {aten.mul.Tensor, aten.div.Tensor}
TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}


@graph_pass("factor")
@dataclass(frozen=True)
class Factor(Pass):
    """linear(x, U + V) = linear(x, U) + linear(x, V);  linear(x, P Q) = linear(linear(x, Q), P);
    linear(x, [U; V]) = [linear(x, U), linear(x, V)];  linear(x, W diag(M_1, …)) = linear(diag(M_1, …) x, W); a scale of
    rows scales the output, a scale of columns the input, a scalar the narrowest side. Convolutions and embeddings
    the same way, where such a step exists.

    It stops where building the product costs less than two thin ones would, for `tokens` rows of x: forward
    and backward, 6 t r (in + out) against 2 t in out + 6 r in out operations. Branch dropout goes on the input of every
    term that holds what is trained.
    """

    tokens: int = 1024

    takes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    leaves: ClassVar[str | None] = "factored"

    def call(self, graph: Graph) -> bool:
        """Rewrite every product with an adapted weight."""
        placed: set[Adaptation] = set()
        found = [node for node in graph.nodes if _is_adapted(node)]
        for node in found:
            rewrite = _Rewrite(graph, node, self.tokens)
            rewrite.run()
            placed |= rewrite.placed
        _refuse_lost_dropout(graph, placed, self)
        return bool(found)


def _is_adapted(node: fx.Node) -> bool:
    """Whether this is a product of the base, or of an earlier rewrite, whose weight is an expression."""
    if node.op != "call_function" or node.meta.get(ADAPTATION) is not None:
        return False
    read = as_affine_map(node)
    return read is not None and _is_expression(read.weight)


def _is_expression(E: fx.Node) -> bool:
    """Whether a weight is one that a method wrote, or the model's own transpose of it."""
    while E.meta.get(ADAPTATION) is None and _transposes(E):
        E = E.args[0]  # type: ignore[assignment]
    return E.meta.get(ADAPTATION) is not None


@dataclass
class _Rewrite:
    """One product `E x + b` taken apart."""

    graph: Graph
    node: fx.Node
    tokens: int
    dropped: dict[tuple[Adaptation, fx.Node], fx.Node] = field(default_factory=dict)
    placed: set[Adaptation] = field(default_factory=set)

    def run(self) -> None:
        """Emit the factored form in front of the node, and let its users read that."""
        read = as_affine_map(self.node)
        assert read is not None
        with self.graph.module.graph.inserting_before(self.node):
            result = self.apply(read.affine, read.x, read.weight, read.flipped, read.bias)
        self.node.replace_all_uses_with(result)
        self.graph.module.graph.erase_node(self.node)

    def apply(self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: Any = None) -> fx.Node:
        """`E x + b` for E (out, in), or stored `(in, out)`: `flipped`."""
        args: Any = E.args
        if not _is_expression(E):  # a parameter, of the base or of the method
            return self.multiply(product, x, E, flipped, bias)
        if _transposes(E):
            return self.apply(product, x, args[0], not flipped, bias)
        if E.target in RESHAPES and E.meta["val"].dim() > 2 and args[0].meta["val"].dim() == 2:
            return self.apply(product, x, args[0], flipped, bias)
        if E.target in RESHAPES and args[0].target in RESHAPES and _same_shape(args[0].args[0], E):
            # There and back, between two methods.
            return self.apply(product, x, args[0].args[0], flipped, bias)
        if E.target is aten.add.Tensor and not E.kwargs and all(_same_shape(a, E) for a in args):
            terms = sorted(args, key=lambda a: self.trains(a, E.meta[ADAPTATION]))
            if not self.gains(product, E, terms[1]):
                return self.multiply(product, x, E, flipped, bias)
            first = self.apply(product, x, terms[0], flipped, bias)
            second = self.apply(product, self.drop(product, x, E, terms[1]), terms[1], flipped)
            return self.emit(aten.add.Tensor, first, second)
        if E.target is aten.cat.default and self.splits(product, E, flipped):
            pieces = [self.apply(product, x, piece, flipped) for piece in args[0]]
            return self.biased(product, self.emit(aten.cat.default, pieces, product.features), bias)
        if E.target in SCALES:
            scaled = self.scaled(product, x, E, flipped, bias)
            if scaled is not None:
                return scaled
        turned = _turned_blocks(E) if isinstance(product, Linear) else None
        if turned is not None and self.tokens < E.meta["val"].shape[0]:
            return self.apply(product, self.turn(x, turned[1]), turned[0], flipped, bias)
        if E.target is aten.mm.default and product.after is not None and self.worth(product, E):
            outer, inner = (args[1], args[0]) if flipped else (args[0], args[1])
            return self.apply(product.after, self.apply(product, x, inner, flipped), outer, flipped, bias)
        return self.multiply(product, x, E, flipped, bias)

    def scaled(self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node | None:
        """A product or quotient of a matrix and a scalar, or a vector along one side; None if it is neither."""
        matrix, scale = E.args[0], E.args[1]
        if isinstance(scale, fx.Node) and not _same_shape(matrix, E) and E.target is aten.mul.Tensor:
            matrix, scale = scale, matrix
        if not isinstance(matrix, fx.Node) or not _same_shape(matrix, E):
            return None
        if not isinstance(scale, fx.Node):
            after = product.after
            # the narrowest place is between the two
            if after is not None and matrix.target is aten.mm.default and self.worth(product, matrix):
                outer, inner = (1, 0) if flipped else (0, 1)
                narrow = self.apply(product, x, matrix.args[inner], flipped)  # type: ignore[arg-type]
                return self.apply(
                    after, self.emit(E.target, narrow, scale), matrix.args[outer], flipped, bias
                )  # type: ignore[arg-type]
            return self.biased(
                product, self.emit(E.target, self.apply(product, x, matrix, flipped), scale), bias
            )
        rows, columns = E.meta["val"].shape
        shape = tuple(scale.meta["val"].shape)
        along_out, along_in = ((1, columns), (rows, 1)) if flipped else ((rows, 1), (1, columns))
        if shape == along_out or (flipped and shape == (columns,)):
            flat = product.along_out(self.emit, scale)
            return self.biased(
                product, self.emit(E.target, self.apply(product, x, matrix, flipped), flat), bias
            )
        if shape == along_in or (not flipped and shape == (columns,)):
            flat = product.along_in(self.emit, scale)
            if flat is not None:
                return self.apply(product, self.emit(E.target, x, flat), matrix, flipped, bias)
        return None

    def turn(self, x: fx.Node, M: fx.Node) -> fx.Node:
        """Blocks of x, each times its matrix: M (n, b, b)."""
        n, _, b = M.meta["val"].shape
        blocks = self.emit(aten.unflatten.int, x, -1, [n, b])
        turned = self.emit(aten.einsum.default, "...nb,ncb->...nc", [blocks, M])
        return self.emit(aten.flatten.using_ints, turned, -2, -1)

    def multiply(self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """The product with E as it is."""
        return product.multiply(self.emit, x, E, flipped, bias)

    def biased(self, product: AffineMap, y: fx.Node, bias: Any) -> fx.Node:
        """`y + b`."""
        return y if bias is None else self.emit(aten.add.Tensor, y, product.along_out(self.emit, bias))

    def drop(self, product: AffineMap, x: fx.Node, E: fx.Node, term: fx.Node) -> fx.Node:
        """x behind the dropout of the method that wrote this sum, for a term without the base weight."""
        adaptation: Adaptation = E.meta[ADAPTATION]
        p = _dropout(adaptation)
        known = {(of, node) for (of, _), node in self.dropped.items()}
        if not p or not product.drops or not self.trains(term, adaptation) or (adaptation, x) in known:
            return x
        self.placed.add(adaptation)
        if (adaptation, x) not in self.dropped:
            flag = training_node(self.graph.module.graph)
            self.dropped[adaptation, x] = self.emit(aten.dropout.default, x, p, flag)
        return self.dropped[adaptation, x]

    def gains(self, product: AffineMap, E: fx.Node, term: fx.Node) -> bool:
        """Whether a term of the sum E is better kept apart: it has dropout of its own, or is thin."""
        adaptation: Adaptation = E.meta[ADAPTATION]
        if _dropout(adaptation) and product.drops and self.trains(term, adaptation):
            return True
        while (term.target in SCALES and not isinstance(term.args[1], fx.Node)) or _transposes(term):
            term = term.args[0]  # type: ignore[assignment]
        return term.target is aten.mm.default and product.after is not None and self.worth(product, term)

    def splits(self, product: AffineMap, E: fx.Node, flipped: bool) -> bool:
        """Whether E is made of rows of several matrices, one of which is better kept apart."""
        pieces, axis = E.args[0], E.args[1] if len(E.args) > 1 else 0
        sums = [p for p in pieces if p.target is aten.add.Tensor and p.meta.get(ADAPTATION) is not None]  # type: ignore[union-attr]
        return axis == int(flipped) and any(self.gains(product, p, t) for p in sums for t in p.args)  # type: ignore[misc]

    def worth(self, product: AffineMap, E: fx.Node) -> bool:
        """Whether two thin products cost less than building the full one, forward and backward."""
        (rows, inner), (_, columns) = (a.meta["val"].shape for a in E.args)  # type: ignore[union-attr]
        if not product.drops:  # a lookup costs nothing
            return True
        thin = 6 * self.tokens * inner * (rows + columns)
        return thin <= 2 * self.tokens * rows * columns + 6 * inner * rows * columns

    def trains(self, E: fx.Node, adaptation: Adaptation) -> bool:
        """Whether what the method trains is inside this term: the branch, beside the term of the base."""
        own = {name for name, param in adaptation.params.values() if param.trained}
        made_from = walk([E], lambda node: node.all_input_nodes)
        return any(node.op == "get_attr" and node.target in own for node in made_from)

    def emit(self, target: Any, *args: Any) -> fx.Node:
        """One operation, recorded as coming from the base's node."""
        return self.graph.call(target, *args, like=self.node)


def _turned_blocks(E: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """W and M (n, b, b), if E is W (out, in) with each of its n blocks of columns times its matrix.

    That is a product of batches in front of which, and behind, rows and blocks are exchanged.
    """
    product = _behind(E)
    if product is None or product.target is not aten.bmm.default:
        return None
    W, M = _behind(product.args[0]), product.args[1]
    if W is None or not isinstance(M, fx.Node) or not _same_shape(W, E):
        return None
    (n, b, c), (_, columns) = M.meta["val"].shape, E.meta["val"].shape
    return (W, M) if b == c and n * b == columns else None


def _behind(E: Any) -> fx.Node | None:
    """What an exchange of the first two axes is made of, behind views that keep the entries' order."""
    exchanged = _plain(E)
    if exchanged.target is not aten.transpose.int or exchanged.args[1:] != (0, 1):
        return None
    return _plain(exchanged.args[0])


def _plain(E: Any) -> fx.Node:
    while E.target in RESHAPES or E.target is aten.clone.default:
        E = E.args[0]
    return E


def _transposes(E: fx.Node) -> bool:
    """Whether this is the transpose of a matrix; `permute(0, 1)` is not."""
    value = E.meta.get("val")
    if E.target not in TRANSPOSES or not isinstance(value, torch.Tensor) or value.dim() != 2:
        return False
    args: Any = E.args
    if E.target is aten.permute.default:
        return [dim % 2 for dim in args[1]] == [1, 0]
    return len({dim % 2 for dim in args[1:]}) != 1  # `transpose(0, 0)` leaves all as it is


def _same_shape(value: Any, E: fx.Node) -> bool:
    return isinstance(value, fx.Node) and tuple(value.meta["val"].shape) == tuple(E.meta["val"].shape)


def _dropout(adaptation: Adaptation) -> float:
    """The share of a branch's inputs that the method drops in training."""
    return adaptation.method.dropout if isinstance(adaptation.method, WeightMethod) else 0.0


def _refuse_lost_dropout(graph: Graph, placed: set[Adaptation], source: Pass) -> None:
    for adaptation in graph.adaptations:
        method = adaptation.method
        if _dropout(adaptation) and adaptation not in placed:
            words = (
                f"{method.name} on {adaptation.site.module} has dropout, but its weight is no sum with a "
                "term of its own that dropout could go in front of"
            )
            raise RefusedError([Refusal(words, (adaptation.site.uses[0].node,))], source)
