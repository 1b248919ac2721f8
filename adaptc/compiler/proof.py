"""A proof: both sides of a rewrite run on the same random inputs, and the error is compared with a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import ProofError, WeightError
from adaptc.inputs import InputSpec
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run
from adaptc.ir.state import stateless
from adaptc.weights import Held, seeded

EPSILONS = 512
"""Tolerated error relative to the largest output, in machine epsilons of a float32 or float64 dtype: 6.1e-05 for
float32. No family of docs/families.md reaches it by rounding alone; a wrong rewrite is off by far more."""
HALF_EPSILONS = 8
"""Tolerated error in machine epsilons of float16 or bfloat16, whose matrix products are summed in float32. Chosen as
a few roundings of the output."""
MASKED = 1e3
"""How many times larger than all other values a constant must be to count as a mask, such as `finfo.min`. Chosen far
above the spread of a model's outputs."""
SIZES = ((2, 5, 4, 3, 6, 7, 8), (1, 1, 1, 1, 1, 1, 1), None)
"""Sizes of the named dimensions: small ones that were not traced, all 1, and those traced."""
TRIES, FEW_TRIES, MORE_ROWS = 16, 3, 16
"""A trained parameter must get a gradient on one of `TRIES` random inputs. After the first `FEW_TRIES` of the traced
sizes, the first dimension is `MORE_ROWS` times longer: some 10,000 tokens of a language model in all."""
Call = Callable[[Batch], Sequence[torch.Tensor]]


class Runner(Protocol):
    """One side of a proof: something that runs batches."""

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        ...


@dataclass(frozen=True)
class BatchRunner:
    """A runner that calls a function on one batch after the other; an exception is that batch's outcome.

    Attributes:
        call: gives the outputs of a batch.
    """

    call: Call

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        return Run(batches, {name: self._one(batch) for name, batch in batches.items()})

    def _one(self, batch: Batch) -> Outcome:
        try:
            return list(self.call(batch))
        except Exception as error:
            return error


def check_weights(graph: Graph) -> None:
    """Check that every weight of a graph is finite, after a proof has failed.

    Raises:
        WeightError: names the first that is not.
    """
    for name in [name for name in graph.weights if name not in graph.buffers]:
        if not torch.isfinite(graph.weights[name].load()).all():
            raise WeightError(f"{name} contains NaN or infinity (non-finite)", "load an intact checkpoint")


def tolerance(graph: Graph) -> float:
    """The tolerated relative error: `EPSILONS` or `HALF_EPSILONS` of the narrowest dtype of the parameters."""
    parameters = [w for name, w in graph.weights.items() if name not in graph.buffers]
    kinds = [w.dtype for w in parameters if w.dtype.is_floating_point] or [torch.float32]
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    return EPSILONS * epsilon if epsilon < 1e-6 else HALF_EPSILONS * epsilon


@dataclass(frozen=True)
class Proof:
    """The result of a comparison.

    Attributes:
        name: what is proved.
        absolute: the largest difference over all outputs and shapes.
        relative: the largest difference over the largest reference value of its output.
        tolerance: the relative error that was allowed.
        shapes: the labels of the batches that were compared.
        coverage: how the sides ran where memory held only a part of them; "" where they ran as a whole.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float
    shapes: tuple[str, ...]
    coverage: str = ""

    def __str__(self) -> str:
        held = f"{self.name}: largest error {self.relative:.1e} of {self.tolerance:.1e} allowed"
        how = f" ({self.coverage})" if self.coverage else ""
        return f"{held}, on {', '.join(self.shapes)}{how}"


def prove(name: str, reference: Run, candidate: Run, allowed: float) -> Proof:
    """Compare two runs on the batches that the reference takes.

    Args:
        name: what is proved.
        reference: the run with the expected outputs, on the inputs of `batches`.
        candidate: the other run, of at least the batches that the reference takes.
        allowed: the relative error tolerated.

    Returns:
        The proof, which held.

    Raises:
        ProofError: the runs differ by more than that, or one is not finite where the other is; or the reference
            runs on none of the shapes.
    """
    absolute = relative = 0.0
    undefined: dict[int, int] = {}
    shapes = tuple(reference.taken)
    if not shapes:
        reason = next(iter(reference.outcomes.values()))
        raise ProofError(f"{name}: the model runs on none of the proof's shapes: {reason}")
    for label in shapes:
        expected, got = reference.outcomes[label], candidate.outcomes[label]
        assert not isinstance(expected, Exception)
        if isinstance(got, Exception):
            raise ProofError(f"{name}: it does not run ({label}): {got}") from got
        if len(expected) != len(got):
            raise ProofError(f"{name}: {len(expected)} outputs became {len(got)}")
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a.shape != b.shape:
                raise ProofError(
                    f"{name}: output {index} is {list(b.shape)}, expected {list(a.shape)} ({label})"
                )
            if _undefined(a) and _undefined(b):
                undefined[index] = undefined.get(index, 0) + 1
                continue
            error, scale = _error(a, b)
            absolute, relative = max(absolute, error), max(relative, error / scale)
    never = [index for index, count in undefined.items() if count == len(shapes)]
    if never:
        raise ProofError(f"{name}: output {never[0]} is NaN on all of the proof's shapes")
    how = ", ".join(dict.fromkeys([*candidate.coverage, *reference.coverage]))
    proof = Proof(name, absolute, relative, allowed, shapes, how)
    if not relative <= allowed:
        raise ProofError(f"the proof failed: {proof}")
    return proof


def batches(inputs: Sequence[InputSpec], seed: int = 0) -> Batches:
    """Random inputs of every shape that a proof runs on, padded rows among them.

    Returns:
        A label of the sizes, such as `batch=2 seq=5` -> the batch.
    """
    by_label: dict[str, Batch] = {}
    for number, candidates in enumerate(SIZES):
        sizes = example_sizes(inputs, candidates)
        label = " ".join(f"{k}={v}" for k, v in sizes.items()) or "fixed sizes"
        if label not in by_label:
            by_label[label] = example_tensors(inputs, sizes, seed=seed + number, pad=True)
    return by_label


def _undefined(value: torch.Tensor) -> bool:
    """Whether an output is undefined for this shape, as the loss of a single token, which predicts none."""
    return value.dim() == 0 and bool(value.isnan())


def _error(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The largest difference between expected `a` and `b`, and the largest expected value.

    The difference is infinite where the dtypes are of other kinds, where the shapes differ, as of a selection by
    values, or where one is finite and the other is not.
    """
    kinds = a.is_complex() != b.is_complex() or a.is_floating_point() != b.is_floating_point()
    if kinds or a.shape != b.shape:
        return float("inf"), 1.0
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = a.double().flatten(), b.double().flatten()
    nonfinite = ~torch.isfinite(a)
    same_infinities = torch.equal(a[nonfinite], b[nonfinite])
    if a.isnan().any() or not same_infinities or not torch.isfinite(b[~nonfinite]).all():
        return float("inf"), 1.0
    a, b = a[~nonfinite], b[~nonfinite]
    if not len(a):
        return 0.0, 1.0
    return float((a - b).abs().max()), max(scale(a[~_masked(a) | (a != b)]), 1e-12)


def scale(values: torch.Tensor) -> float:
    """The largest absolute value that is finite and no mask; 0 if there is none."""
    finite = values[torch.isfinite(values)]
    unmasked = finite[~_masked(finite)]
    return float(unmasked.abs().max()) if len(unmasked) else 0.0


def _masked(values: torch.Tensor) -> torch.Tensor:
    """Where the smallest value is, if it is `MASKED` times larger than all others: `masked_fill(..., finfo.min)`."""
    if not len(values):
        return torch.zeros_like(values, dtype=torch.bool)
    smallest = values == values.min()
    rest = values[~smallest]
    far = len(rest) > 0 and float(values.min().abs()) > MASKED * float(rest.abs().max()) > 0
    return smallest if far else torch.zeros_like(smallest)


def module_call(module: torch.nn.Module, device: str = "cpu") -> Call:
    """A function that runs a module in evaluation mode on its `device`, and gives its output tensors on the CPU.

    The module's buffers and attributes are as before after each call.
    """

    def call(tensors: Batch) -> list[torch.Tensor]:
        with evaluating(module), stateless(module), torch.no_grad():
            result = module(**{name: tensor.to(device) for name, tensor in tensors.items()})
        return [leaf.cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    return call


@contextmanager
def evaluating(module: torch.nn.Module) -> Generator[None]:
    """A context in evaluation mode; afterwards every submodule has its earlier mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def randomised(graph: Graph, seed: int = 0, strength: float = 1.0) -> Graph:
    """A copy of the graph with noise added to every inserted parameter, so that no zero hides a mistake.

    The noise has a tenth of the parameter's spread, plus 0.02 for parameters that start at zero: chosen to change the
    outputs visibly and leave them of their usual size. `strength` multiplies it.
    """
    copied = graph.copy()
    for name in copied.adapter_names:
        value = copied.weights[name].load().float()
        noise = torch.randn(value.shape, generator=seeded(seed, name))
        spread = value.std() if value.numel() > 1 and value.std() > 0 else value.abs().mean()
        noisy = value + strength * (0.1 * spread + 0.02) * noise
        copied.weights[name] = Held(noisy.to(copied.weights[name].dtype))
    return copied


def effect(reference: Run, candidate: Run) -> float:
    """The largest relative difference of two runs, on the batches that both took; 0 where they share none."""
    largest = 0.0
    for name in reference.taken.keys() & candidate.taken.keys():
        expected, got = reference.outcomes[name], candidate.outcomes[name]
        assert not isinstance(expected, Exception)
        assert not isinstance(got, Exception)
        for a, b in zip(expected, got, strict=True):
            error, scale = _error(a, b)
            largest = max(largest, error / scale)
    return largest


def gradients(module: torch.nn.Module, graph: Graph, names: Sequence[str]) -> None:
    """Check that every trained parameter gets a gradient on one of `TRIES` random inputs.

    More inputs are drawn only while a gradient is zero, since an expert may not be routed to. A parameter on no path
    to the output has no gradient (None) on any input.

    Args:
        module: the trainable module, with random adapters.
        graph: its graph.
        names: the trained parameters.

    Raises:
        ProofError: names what got none.
    """
    pending, unreachable = set(names), set[str]()
    parameters = dict(module.named_parameters())
    sizes = example_sizes(graph.inputs)
    for seed in range(1, 1 + TRIES):
        if seed == 1 + FEW_TRIES:
            sizes |= {name: size * MORE_ROWS for name, size in list(sizes.items())[:1]}
        _backward(module, example_tensors(graph.inputs, sizes, seed=seed), seed)
        grads = {name: parameters[name].grad for name in pending}
        unreachable = {name for name, grad in grads.items() if grad is None}
        pending = {name for name, grad in grads.items() if grad is None or not grad.any()}
        if not pending:
            return
        if unreachable:
            break
    where = "the output" if unreachable else f"the output of any of {TRIES} random inputs"
    raise ProofError(
        f"{len(pending)} trained parameters get no gradient, such as {min(unreachable or pending)}: that layer has no "
        f"effect on {where}; leave it out with `exclude`"
    )


def _backward(module: torch.nn.Module, tensors: Batch, seed: int) -> None:
    """Run a module, and add the gradients of a random sum of its outputs to its parameters.

    Raises:
        ProofError: it does not run, or no output depends on a trained parameter.
    """
    try:
        with evaluating(module):
            leaves = [
                leaf for leaf in pytree.tree_leaves(module(**tensors)) if isinstance(leaf, torch.Tensor)
            ]
    except Exception as error:
        raise ProofError(f"the model does not run on its own inputs: {error}") from error
    # Random weights on the outputs: a plain sum has no gradient through a softmax or a layer norm.
    generator = torch.Generator().manual_seed(seed)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    terms = [(leaf * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)).sum() for leaf in trained]
    if not terms:
        raise ProofError("no output depends on a trained parameter")
    torch.autograd.backward(sum(terms[1:], terms[0]))
