"""Factor: a matrix product is distributed over its weight's expression, so that no adapted weight is ever built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.analysis.affine_maps import AffineMap, Linear, as_affine_map
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, RESHAPES, operation
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

    A product of two thin matrices stays whole where building it costs less than two thin products with x, for `tokens`
    rows of x, forward and backward: 2 t in out + 6 r in out operations against 6 t r (in + out). A method's dropout
    goes on the input of every term that contains what the method trains.
    """

    tokens: int = 1024

    takes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    leaves: ClassVar[str | None] = "factored"

    def call(self, graph: Graph) -> bool:
        """Rewrite every matrix product with an adapted weight."""
        placed: set[Adaptation] = set()
        products = [node for node in graph.nodes if _is_adapted(node)]
        for node in products:
            rewrite = _Rewrite(graph, node, self.tokens)
            rewrite.run()
            placed |= rewrite.placed
        _refuse_lost_dropout(graph, placed, self)
        return bool(products)


def _is_adapted(node: fx.Node) -> bool:
    """Whether this is a matrix product of the base, or of an earlier rewrite, whose weight is an expression."""
    if node.op != "call_function" or node.meta.get(ADAPTATION) is not None:
        return False
    product = as_affine_map(node)
    return product is not None and _is_expression(product.weight)


def _is_expression(E: fx.Node) -> bool:
    """Whether a weight is a method's expression, or a transpose of one that the model computes."""
    node: Any = E
    while node.meta.get(ADAPTATION) is None and _transposes(node):
        node = node.args[0]
    return node.meta.get(ADAPTATION) is not None


@dataclass
class _Rewrite:
    """One matrix product `E x + b`, distributed over E.

    Attributes:
        graph: the host.
        node: the product.
        tokens: rows of x that costs are counted for.
        dropped: (adaptation, x) -> x after the adaptation's dropout.
        placed: the adaptations whose dropout has a place in the result.
    """

    graph: Graph
    node: fx.Node
    tokens: int
    dropped: dict[tuple[Adaptation, fx.Node], fx.Node] = field(
        default_factory=dict[tuple[Adaptation, fx.Node], fx.Node]
    )
    placed: set[Adaptation] = field(default_factory=set[Adaptation])

    def run(self) -> None:
        """Insert the factored form in front of the node, and let the node's users read it."""
        whole = as_affine_map(self.node)
        assert whole is not None
        with self.graph.module.graph.inserting_before(self.node):
            result = self.apply(whole.affine, whole.x, whole.weight, whole.flipped, whole.bias)
        self.node.replace_all_uses_with(result)
        self.graph.module.graph.erase_node(self.node)

    def apply(
        self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: object = None
    ) -> fx.Node:
        """`E x + b` for E (out, in), or (in, out) where it is `flipped`."""
        args: Any = E.args
        if not _is_expression(E):  # a parameter, of the base or of the method
            return self.multiply(product, x, E, flipped, bias)
        if _transposes(E):
            return self.apply(product, x, args[0], not flipped, bias)
        if operation(E) in RESHAPES and E.meta["val"].dim() > 2 and args[0].meta["val"].dim() == 2:
            return self.apply(product, x, args[0], flipped, bias)
        if operation(E) in RESHAPES and operation(args[0]) in RESHAPES and _same_shape(args[0].args[0], E):
            # A reshape and its inverse, between two methods.
            return self.apply(product, x, args[0].args[0], flipped, bias)
        if E.target is aten.add.Tensor and not E.kwargs and all(_same_shape(a, E) for a in args):
            terms = sorted(args, key=lambda a: self.trains(a, E.meta[ADAPTATION]))
            if not self.gains(product, E, terms[1]):
                return self.multiply(product, x, E, flipped, bias)
            first = self.apply(product, x, terms[0], flipped, bias)
            second = self.apply(product, self.after_dropout(product, x, E, terms[1]), terms[1], flipped)
            return self.emit(aten.add.Tensor, first, second)
        if E.target is aten.cat.default and self.splits(product, E, flipped):
            pieces = [self.apply(product, x, piece, flipped) for piece in args[0]]
            return self.biased(product, self.emit(aten.cat.default, pieces, product.features), bias)
        if E.target in SCALES:
            scaled = self.scaled(product, x, E, flipped, bias)
            if scaled is not None:
                return scaled
        factors = _block_diagonal_factors(E) if isinstance(product, Linear) else None
        if factors is not None and self.tokens < E.meta["val"].shape[0]:
            return self.apply(product, self.times_blocks(x, factors[1]), factors[0], flipped, bias)
        if E.target is aten.mm.default and product.after is not None and self.worth(product, E):
            outer, inner = (args[1], args[0]) if flipped else (args[0], args[1])
            return self.apply(product.after, self.apply(product, x, inner, flipped), outer, flipped, bias)
        return self.multiply(product, x, E, flipped, bias)

    def scaled(
        self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: object
    ) -> fx.Node | None:
        """`E x + b` for E a matrix times, or divided by, a scalar or a vector along one side; None if E is neither."""
        matrix, scale = E.args[0], E.args[1]
        if isinstance(scale, fx.Node) and not _same_shape(matrix, E) and E.target is aten.mul.Tensor:
            matrix, scale = scale, matrix
        if not isinstance(matrix, fx.Node) or not _same_shape(matrix, E):
            return None
        if not isinstance(scale, fx.Node):
            after = product.after
            # where r numbers a token are scaled, not in or out
            if after is not None and matrix.target is aten.mm.default and self.worth(product, matrix):
                outer, inner = (1, 0) if flipped else (0, 1)
                matrices: Any = matrix.args
                narrow = self.apply(product, x, matrices[inner], flipped)
                return self.apply(after, self.emit(E.target, narrow, scale), matrices[outer], flipped, bias)
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

    def times_blocks(self, x: fx.Node, M: fx.Node) -> fx.Node:
        """`diag(M_1, …) x`: each of the n blocks of x's features times its matrix of M (n, b, b)."""
        n, _, b = M.meta["val"].shape
        blocks = self.emit(aten.unflatten.int, x, -1, [n, b])
        multiplied = self.emit(aten.einsum.default, "...nb,ncb->...nc", [blocks, M])
        return self.emit(aten.flatten.using_ints, multiplied, -2, -1)

    def multiply(self, product: AffineMap, x: fx.Node, E: fx.Node, flipped: bool, bias: object) -> fx.Node:
        """`E x + b` with E built."""
        return product.multiply(self.emit, x, E, flipped, bias)

    def biased(self, product: AffineMap, y: fx.Node, bias: Any) -> fx.Node:
        """`y + b`; y itself without a bias."""
        return y if bias is None else self.emit(aten.add.Tensor, y, product.along_out(self.emit, bias))

    def after_dropout(self, product: AffineMap, x: fx.Node, E: fx.Node, term: fx.Node) -> fx.Node:
        """x after the dropout of the method whose sum E is, for a term that contains what it trains; else x itself."""
        adaptation: Adaptation = E.meta[ADAPTATION]
        p = _dropout(adaptation)
        results = {(of, node) for (of, _), node in self.dropped.items()}
        if not p or not product.drops or not self.trains(term, adaptation) or (adaptation, x) in results:
            return x
        self.placed.add(adaptation)
        if (adaptation, x) not in self.dropped:
            flag = training_node(self.graph.module.graph)
            self.dropped[adaptation, x] = self.emit(aten.dropout.default, x, p, flag)
        return self.dropped[adaptation, x]

    def gains(self, product: AffineMap, E: fx.Node, term: fx.Node) -> bool:
        """Whether a term of the sum E should be a product of its own: it has dropout, or is thin."""
        adaptation: Adaptation = E.meta[ADAPTATION]
        if _dropout(adaptation) and product.drops and self.trains(term, adaptation):
            return True
        matrix: Any = term
        while (matrix.target in SCALES and not isinstance(matrix.args[1], fx.Node)) or _transposes(matrix):
            matrix = matrix.args[0]
        return matrix.target is aten.mm.default and product.after is not None and self.worth(product, matrix)

    def splits(self, product: AffineMap, E: fx.Node, flipped: bool) -> bool:
        """Whether E is rows of several matrices, one of them a sum with a term that should be a product of its own."""
        args: Any = E.args
        axis = args[1] if len(args) > 1 else 0
        sums = [p for p in args[0] if p.target is aten.add.Tensor and p.meta.get(ADAPTATION) is not None]
        return axis == int(flipped) and any(self.gains(product, p, t) for p in sums for t in p.args)

    def worth(self, product: AffineMap, E: fx.Node) -> bool:
        """Whether two thin products cost no more than building their product E, forward and backward."""
        args: Any = E.args
        (rows, inner), (_, columns) = (tuple(matrix.meta["val"].shape) for matrix in args)
        if not product.drops:  # a lookup costs nothing
            return True
        thin: int = 6 * self.tokens * inner * (rows + columns)
        return thin <= 2 * self.tokens * rows * columns + 6 * inner * rows * columns

    def trains(self, E: fx.Node, adaptation: Adaptation) -> bool:
        """Whether a term is computed from a tensor that the method trains."""
        trained = {name for name, param in adaptation.params.values() if param.trained}
        operands = walk([E], lambda node: node.all_input_nodes)
        return any(node.op == "get_attr" and node.target in trained for node in operands)

    def emit(self, target: object, *args: Any) -> fx.Node:
        """Insert an operation, recorded as coming from the base's product."""
        return self.graph.call(target, *args, like=self.node)


def _block_diagonal_factors(E: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """W (out, in) and M (n, b, b), if E is `W diag(M_1, …)`: each of W's n blocks of columns times its matrix.

    A method writes that as a batched product, with rows and blocks exchanged before and after it.
    """
    product = _without_exchange(E)
    if product is None or product.target is not aten.bmm.default:
        return None
    W, M = _without_exchange(product.args[0]), product.args[1]
    if W is None or not isinstance(M, fx.Node) or not _same_shape(W, E):
        return None
    (n, b, c), (_, columns) = M.meta["val"].shape, E.meta["val"].shape
    return (W, M) if b == c and n * b == columns else None


def _without_exchange(E: object) -> fx.Node | None:
    """The value whose first two axes E exchanges, seen through reshapes; None if E is no such exchange."""
    exchange = _unshaped(E)
    if exchange.target is not aten.transpose.int or exchange.args[1:] != (0, 1):
        return None
    return _unshaped(exchange.args[0])


def _unshaped(node: Any) -> fx.Node:
    """The value that a node reshapes, which keeps the order of its numbers; the node itself if it does not."""
    while operation(node) in RESHAPES or node.target is aten.clone.default:
        node = node.args[0]
    return node


def _transposes(E: fx.Node) -> bool:
    """Whether a node transposes a matrix; `permute(0, 1)` does not."""
    value = E.meta.get("val")
    if E.target not in TRANSPOSES or not isinstance(value, torch.Tensor) or value.dim() != 2:
        return False
    args: Any = E.args
    if E.target is aten.permute.default:
        return [dim % 2 for dim in args[1]] == [1, 0]
    return len({dim % 2 for dim in args[1:]}) != 1  # `transpose(0, 0)` exchanges nothing


def _same_shape(value: object, E: fx.Node) -> bool:
    return isinstance(value, fx.Node) and tuple(value.meta["val"].shape) == tuple(E.meta["val"].shape)


def _dropout(adaptation: Adaptation) -> float:
    """The share of its inputs that a method drops in training; 0 for a method without dropout."""
    return adaptation.method.dropout if isinstance(adaptation.method, WeightMethod) else 0.0


def _refuse_lost_dropout(graph: Graph, placed: set[Adaptation], source: Pass) -> None:
    """Raise for the first adaptation with dropout that no rewrite has placed.

    Raises:
        RefusedError: there is one.
    """
    for adaptation in graph.adaptations:
        if _dropout(adaptation) and adaptation not in placed:
            reason = (
                f"{adaptation.method.name} on {adaptation.site.module} has dropout, but its weight is not a sum "
                "with a term of its own, whose input could be dropped"
            )
            raise RefusedError([Refusal(reason, (adaptation.site.uses[0].node,))], source)
