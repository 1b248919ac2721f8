"""Proofs: both sides of a rewrite run on the same fresh inputs, and the error is held against a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import ProofError, WeightError
from adaptc.inputs import InputSpec
from adaptc.ir.example_inputs import EXAMPLE_SIZES, example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run
from adaptc.weights import Held, seeded

EPSILONS = 512
"""Tolerated error, in units of the dtype's machine epsilon, relative to the largest output: rounding of some
hundred operations in another order, and far below what a wrong rewrite makes."""
HALF_EPSILONS = 8
"""The same for float16 and bfloat16, whose products are summed in float32."""
MASKED = 1e3
"""How far beyond all other values a constant is that stands for "not this one"."""
SIZES = ((2, 5, 4, 3, 6, 7, 8), (1, 1, 1, 1, 1, 1, 1), EXAMPLE_SIZES)
"""Sizes of the named dimensions: small and other than those traced, one of each, and those traced."""
TRIES, FEW_TRIES, MORE_ROWS = 16, 3, 16
"""Random inputs on which a trained parameter must get a gradient once. After a few of the traced sizes, the first
dimension is 16 times longer: some 10,000 tokens of a language model in all."""
Call = Callable[[Batch], Sequence[torch.Tensor]]


class Runner(Protocol):
    """One side of a proof: something that runs batches."""

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        ...


@dataclass(frozen=True)
class BatchRunner:
    """A runner of something in memory, which takes one batch after the other."""

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
    """Every weight of a graph is a number: what is looked at where a proof has failed.

    Raises:
        WeightError: names the first that is not.
    """
    for name in [name for name in graph.weights if name not in graph.buffers]:
        if not torch.isfinite(graph.weights[name].load()).all():
            raise WeightError(
                f"{name} holds NaN or infinity, so that the model computes nothing", "mend the checkpoint"
            )


def tolerance(graph: Graph) -> float:
    """The tolerated relative error, by the narrowest dtype of the parameters."""
    parameters = [w for name, w in graph.weights.items() if name not in graph.buffers]
    kinds = [w.dtype for w in parameters if w.dtype.is_floating_point] or [torch.float32]
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    return EPSILONS * epsilon if epsilon < 1e-6 else HALF_EPSILONS * epsilon


@dataclass(frozen=True)
class Proof:
    """What was compared, on which shapes, and how far apart it was.

    `absolute` and `relative` are the largest over all outputs and shapes; `relative` is over the largest
    reference value of that output. `coverage` says how the sides ran where memory held only a part of them.
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
    """Hold two runs against one another, on the batches that the reference takes.

    Args:
        name: what is proved.
        reference: what must come out, on fresh random inputs of several shapes, padded rows among them.
        candidate: what came out of the other side, at least for the batches that the reference takes.
        allowed: the relative error tolerated.

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
    """Fresh random inputs of every shape a proof runs on, padded rows among them, by what the shape is called."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, among in enumerate(SIZES):
        sizes = example_sizes(inputs, among)
        label = " ".join(f"{k}={v}" for k, v in sizes.items()) or "fixed sizes"
        if label not in found:
            found[label] = example_tensors(inputs, sizes, seed=seed + number, pad=True)
    return found


def _undefined(value: torch.Tensor) -> bool:
    """Whether an output has no value on inputs of this shape, as the loss of one token that predicts none."""
    return value.dim() == 0 and bool(value.isnan())


def _error(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The largest error, and the largest value it is held against; infinite where the two are of other kinds."""
    if a.is_complex() != b.is_complex() or a.is_floating_point() != b.is_floating_point():
        return float("inf"), 1.0
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = a.double().flatten(), b.double().flatten()
    odd = ~torch.isfinite(a)
    if a.isnan().any() or not torch.equal(a[odd], b[odd]) or not torch.isfinite(b[~odd]).all():
        return float("inf"), 1.0
    a, b = a[~odd], b[~odd]
    if not len(a):
        return 0.0, 1.0
    return float((a - b).abs().max()), max(scale(a[~_masked(a) | (a != b)]), 1e-12)


def scale(values: torch.Tensor) -> float:
    """The largest finite value, but for one number that masks: it is a constant, and far beyond all others."""
    finite = values[torch.isfinite(values)]
    rest = finite[~_masked(finite)]
    return float(rest.abs().max()) if len(rest) else 0.0


def _masked(values: torch.Tensor) -> torch.Tensor:
    """Where the smallest value stands, if it is `MASKED` times beyond all others: `masked_fill(..., finfo.min)`."""
    if not len(values):
        return torch.zeros_like(values, dtype=torch.bool)
    found = values == values.min()
    rest = values[~found]
    far = len(rest) > 0 and float(values.min().abs()) > MASKED * float(rest.abs().max()) > 0
    return found if far else torch.zeros_like(found)


def module_call(module: torch.nn.Module, device: str = "cpu") -> Call:
    """Run a module on the device that it is on, in evaluation mode, and flatten its outputs."""

    def call(tensors: Batch) -> list[torch.Tensor]:
        with evaluating(module), torch.no_grad():
            result = module(**{name: tensor.to(device) for name, tensor in tensors.items()})
        return [leaf.cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    return call


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule then has its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def randomised(graph: Graph, seed: int = 0, strength: float = 1.0) -> Graph:
    """The graph with noise added to every inserted parameter, so that no zero hides a mistake."""
    copied = graph.copy()
    for name in copied.adapter_names:
        value = copied.weights[name].load().float()
        noise = torch.randn(value.shape, generator=seeded(seed, name))
        spread = value.std() if value.numel() > 1 and value.std() > 0 else value.abs().mean()
        noisy = value + strength * (0.1 * spread + 0.02) * noise
        copied.weights[name] = Held(noisy.to(copied.weights[name].dtype))
    return copied


def effect(reference: Run, candidate: Run) -> float:
    """How far apart two runs are, relative to the largest value, on the batches that both took.

    Gives 0 where they share none.
    """
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
    """Check that with random adapters every trained parameter gets a gradient, on one of `TRIES` random inputs.

    More inputs are drawn only while a gradient is zero, since an expert may not be routed to; a parameter that no
    path leads to has no gradient on any input.

    Raises:
        ProofError: names what got none.
    """
    left, unreachable = set(names), set[str]()
    parameters = dict(module.named_parameters())
    sizes = example_sizes(graph.inputs)
    for seed in range(1, 1 + TRIES):
        if seed == 1 + FEW_TRIES:
            sizes |= {name: size * MORE_ROWS for name, size in list(sizes.items())[:1]}
        _backward(module, example_tensors(graph.inputs, sizes, seed=seed), seed)
        grads = {name: parameters[name].grad for name in left}
        unreachable = {name for name, grad in grads.items() if grad is None}
        left = {name for name, grad in grads.items() if grad is None or not grad.any()}
        if not left:
            return
        if unreachable:
            break
    where = "the output" if unreachable else f"the output of any of {TRIES} random inputs"
    raise ProofError(
        f"{len(left)} trained parameters get no gradient, such as {min(unreachable or left)}: that layer has no "
        f"effect on {where}; leave it out with `exclude`"
    )


def _backward(module: torch.nn.Module, tensors: Batch, seed: int) -> None:
    try:
        with evaluating(module):
            leaves = [
                leaf for leaf in pytree.tree_leaves(module(**tensors)) if isinstance(leaf, torch.Tensor)
            ]
    except Exception as error:
        raise ProofError(f"the model does not run on its own inputs: {error}") from error
    # Random weights on the outputs: a plain sum has no gradient through a softmax or a layer norm.
    generator = torch.Generator().manual_seed(seed)
    grown = [leaf for leaf in leaves if leaf.requires_grad]
    total: Any = sum(
        (leaf * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)).sum() for leaf in grown
    )
    if not isinstance(total, torch.Tensor):
        raise ProofError("no output depends on anything trained")
    total.backward()
