"""The inputs that proofs run on: a person's own first, then random ones like them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from adaptc.compiler.calibration import checked_batches, read_rows
from adaptc.errors import InputError, SpecError
from adaptc.inputs import InputSpec
from adaptc.ir.drawn_values import values_of
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Batches
from adaptc.spec.spec import Spec, resolve_path

SIZES = ((2, 5, 4, 3, 6, 7, 8), (1, 1, 1, 1, 1, 1, 1), None)
"""Sizes of the named dimensions: small ones that were not traced, all 1, and those traced."""
GROWTH = 4
"""How much larger random inputs get, where a model takes no smaller ones."""
CALIBRATION_ROWS = 2
"""How many rows of the calibration data a proof runs on. Chosen as few, since each is a run of the model."""


@dataclass(frozen=True)
class Draw:
    """Random inputs of one size.

    Attributes:
        sizes: name of a dimension -> size.
        seed: of the random numbers.
    """

    sizes: Mapping[str, int]
    seed: int

    @property
    def label(self) -> str:
        """The sizes as a label, such as `batch=2 seq=5`."""
        return " ".join(f"{name}={size}" for name, size in self.sizes.items()) or "fixed sizes"

    def batch(self, inputs: Sequence[InputSpec]) -> Batch:
        """The inputs, padded rows among them."""
        return example_tensors(inputs, self.sizes, seed=self.seed, pad=True)


def draws(
    inputs: Sequence[InputSpec], seed: int = 0, shapes: Sequence[Mapping[str, int]] = ()
) -> dict[str, Draw]:
    """Random inputs of every size that a proof runs on.

    Args:
        inputs: the model's inputs.
        seed: of the first of them.
        shapes: the sizes; `SIZES` if there are none. A dimension that one leaves out has the size traced.

    Returns:
        label -> draw.
    """
    traced = example_sizes(inputs)
    sizes = [traced | dict(shape) for shape in shapes] or [example_sizes(inputs, among) for among in SIZES]
    by_label: dict[str, Draw] = {}
    for number, each in enumerate(sizes):
        draw = Draw(each, seed + number)
        by_label.setdefault(draw.label, draw)
    return by_label


def grown(draw: Draw, inputs: Sequence[InputSpec]) -> Iterator[Draw]:
    """Larger inputs than those that a model does not take: `GROWTH` times, up to the sizes traced."""
    traced, sizes = example_sizes(inputs), dict(draw.sizes)
    while any(sizes[name] < size for name, size in traced.items()):
        sizes = {name: max(sizes[name], min(GROWTH * sizes[name], size)) for name, size in traced.items()}
        yield Draw(sizes, draw.seed)


def batches(graph: Graph, seed: int = 0) -> Batches:
    """A person's own inputs, and random ones of every size that a proof runs on.

    Returns:
        label -> batch.
    """
    drawn = draws(graph.inputs, seed, graph.proof_shapes)
    return {**graph.examples, **{label: draw.batch(graph.inputs) for label, draw in drawn.items()}}


def take_examples(spec: Spec, graph: Graph) -> None:
    """Give a graph the inputs that a person has given for its proofs, and let random ones be drawn like them.

    They are the example inputs of a call, some rows of its calibration data, and all rows of the file that the spec's
    `proof` names.

    Args:
        spec: names the file and the sizes.
        graph: the traced graph, whose `examples`, `proof_shapes` and `inputs` are set.

    Raises:
        SpecError: the file cannot be read or does not fit the model's inputs, or a size is of no named dimension.
    """
    examples = dict(graph.examples)
    for number, row in enumerate(islice(graph.calibration_rows, CALIBRATION_ROWS), 1):
        examples[f"calibration row {number}"] = row
    if spec.proof is not None and spec.proof.inputs is not None:
        examples |= _rows(spec, graph, resolve_path(spec, spec.proof.inputs))
    graph.examples, graph.proof_shapes = examples, _shapes(spec, graph)
    graph.inputs = tuple(_like(each, list(examples.values())) for each in graph.inputs)


def _rows(spec: Spec, graph: Graph, path: Path) -> dict[str, Batch]:
    """The batches of a file: one a row, or all rows as they are stacked."""
    try:
        rows = checked_batches(read_rows(path, graph.inputs), graph.inputs)
    except InputError as error:
        raise spec.error(("proof", "inputs"), error.message, *error.notes) from error
    if len(rows) == 1:
        return {path.name: rows[0]}
    return {f"{path.name} row {number}": row for number, row in enumerate(rows, 1)}


def _shapes(spec: Spec, graph: Graph) -> tuple[Mapping[str, int], ...]:
    """The sizes that the spec states, by the named dimensions of the inputs."""
    shapes = spec.proof.shapes if spec.proof is not None else ()
    names = dict.fromkeys(dim for each in graph.inputs for dim in each.dims if isinstance(dim, str))
    for index, shape in enumerate(shapes):
        for name in shape:
            if name not in names:
                dims = ", ".join(names) or "none: all sizes are fixed"
                loc, message = ("proof", "shapes", index, name), f"the inputs have no dimension {name!r}"
                raise SpecError([spec.source.problem(loc, message, f"they have {dims}", at_key=True)])
    return shapes


def _like(spec: InputSpec, examples: Sequence[Batch]) -> InputSpec:
    """An input whose random values are drawn like those of its examples; those below a model's bound stay so."""
    if spec.values is not None or spec.high is not None or not examples:
        return spec
    return replace(spec, values=values_of(spec.name, [example[spec.name] for example in examples]))
