"""Alternatives by row: one graph of all, what each row of a batch must get, and the inputs of their proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from adaptc.compiler.alternatives.rows_graph import merged_rows, sizes_of
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.proofs import Proofs
from adaptc.compiler.trainable import module_record
from adaptc.ir.analysis.token_axes import TokenAxis
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Batches, Interpreter, Outcome, Run
from adaptc.ir.nodes import copy_nodes
from adaptc.ir.row_calls import IDS, RowsGraph
from adaptc.rewriter.rows.gather import CONSTANTS
from adaptc.rewriter.rows.row_axis import Rows, rows_of

TITLE = "rows, each beside its adapter alone"
"""What the proof of a graph with adapters by row is called."""


class ByRow:
    """Alternatives in one graph, in which each row of a batch has its own.

    Args:
        adapted: the adapted graph of what is always on, then that with each alternative; factored or not.
        alone: the live graphs of the same.
        base: the traced graph.
        names: of the alternatives.
        proofs: of the compile, whose tolerance holds here too.
        trains: the merged graph is trained.

    Attributes:
        graph: the merged graph.
        proofs: of it, on inputs that name every adapter.

    Raises:
        RefusedError: rows meet, or there are none.
    """

    def __init__(
        self,
        adapted: Sequence[Graph],
        alone: Sequence[Graph],
        base: Graph,
        names: Sequence[str],
        proofs: Proofs,
        trains: bool = False,
    ):
        self.alone, self.names = alone, names
        self.graph = merged_rows(adapted[0], adapted[1:], trains)
        self.graph.examples = {
            label: {**batch, IDS: _cycled(batch, base, len(names))} for label, batch in base.examples.items()
        }
        self.proofs = Proofs(self.graph, proofs.seed, proofs.stated)
        self.proofs.batches = _with_all(self.proofs.batches, len(names))

    @property
    def sizes(self) -> dict[str, dict[str, list[int]]]:
        """Outputs whose sizes differ between adapters: name -> adapter -> its sizes; others have zeros behind."""
        names = ("", *self.names)
        return {name: dict(zip(names, each, strict=True)) for name, each in sizes_of(self.alone).items()}

    def prove(self) -> tuple[Proof, Run]:
        """Prove that every row gets what its adapter alone gives.

        Returns:
            The proof, and what the adapters alone give, row by row.

        Raises:
            ProofError: it does not.
        """
        reference = self.expected(self.proofs.batches)
        proof = self.proofs.prove(TITLE, self.graph, reference, self.proofs.run_like(reference, self.graph))
        return proof, reference

    def expected(self, batches: Batches) -> Run:
        """What the adapters alone give for the rows of some batches, put together."""
        rows = rows_of(self.graph)
        assert isinstance(rows, Rows)
        plain = {label: {n: t for n, t in b.items() if n != IDS} for label, b in batches.items()}
        runs: list[Run] = []
        for number, graph in enumerate(self.alone):
            asked = {label for label, b in batches.items() if bool((b[IDS] == number - 1).any())}
            runs.append(Interpreter(graph, torch.float32).on({n: b for n, b in plain.items() if n in asked}))
        outcomes = {
            label: _put_together(
                batch[IDS], [run.outcomes.get(label) for run in runs], _axes(self.graph, rows)
            )
            for label, batch in batches.items()
        }
        return Run(batches, outcomes, tuple(self.graph.tensor_outputs), runs[0].coverage)


def _axes(graph: Graph, rows: Rows) -> list[TokenAxis | None]:
    """Where the rows are in each output that is a tensor."""
    output = next(node for node in graph.nodes if node.op == "output")
    return [rows.axis(n) for n in output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _put_together(
    ids: torch.Tensor, outcomes: Sequence[Outcome | None], axes: Sequence[TokenAxis | None]
) -> Outcome:
    """The rows of one batch, each from the run of its adapter; an error where one of these runs failed."""
    failed = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if failed is not None:
        return failed
    given = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, list)}
    results: list[torch.Tensor] = []
    for position, axis in enumerate(axes):
        values = {number: outcome[position] for number, outcome in given.items()}
        results.append(_chosen(ids, values, axis))
    return results


def _chosen(ids: torch.Tensor, values: Mapping[int, torch.Tensor], axis: TokenAxis | None) -> torch.Tensor:
    """One output: row i from the value of its adapter, with zeros behind where another's is larger."""
    first = next(iter(values.values()))
    if axis is None:
        return first
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values.values()), strict=True)]
    result = first.new_zeros(shape)
    for number, value in values.items():
        by_row = (ids == number - 1).reshape(1, -1, 1)
        entries = value.shape[axis.axis]
        before = int(axis.before) if axis.before.is_Integer else 1
        mask = by_row.expand(before, -1, entries // (before * len(ids))).reshape(-1)
        index = [slice(0, size) for size in value.shape]
        part = result[tuple(index)]
        where = mask.view(*[1] * axis.axis, -1, *[1] * (value.dim() - axis.axis - 1))
        part.copy_(torch.where(where, value, part))
    return result


def _cycled(batch: Batch, base: Graph, count: int) -> torch.Tensor:
    """Adapters for a person's own rows: all in turn, the base first."""
    first = next(s for s in base.inputs if s.dims and isinstance(s.dims[0], str))
    return torch.arange(batch[first.name].shape[0]) % (count + 1) - 1


def _with_all(batches: Batches, count: int) -> Batches:
    """Batches in which every adapter occurs: the first ones again, with those that were left out."""
    left = sorted(set(range(-1, count)) - {int(i) for batch in batches.values() for i in batch[IDS]})
    label, first = max(batches.items(), key=lambda item: len(item[1][IDS]))
    result = dict(batches)
    while left:
        ids = torch.tensor((left + list(range(-1, count)))[: len(first[IDS])])
        ids = ids if len(ids) == len(first[IDS]) else ids.repeat(len(first[IDS]))[: len(first[IDS])]
        left = [number for number in left if number not in ids]
        result[f"{label}, adapters {', '.join(str(int(i)) for i in ids)}"] = {**first, IDS: ids}
    return result


def rows_graph(graph: Graph, base: Mapping[str, str]) -> RowsGraph:
    """A merged graph as a module with alternatives takes it.

    Args:
        graph: the merged graph, in both modes.
        base: what a checkpoint says of the base.
    """
    nodes = copy_nodes(graph.module.graph)
    output = next(node for node in nodes.nodes if node.op == "output")
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    nodes.set_codegen(CodeGen())
    constants = {name: w.load() for name, w in graph.weights.items() if name.startswith(f"{CONSTANTS}.")}
    # Its adapters are told of by the graphs of the alternatives.
    record = module_record(replace(graph, adaptations=[]), dict(base)) | {"trainable": graph.adapter_names}
    return RowsGraph(nodes, constants, record)
