"""Proofs: both sides of a rewrite run on the same fresh inputs, and the error is held against a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import ProofError
from adaptc.graph import Graph
from adaptc.inputs import InputSpec
from adaptc.tracing.export import EXAMPLE_SIZES, example_sizes, example_tensors
from adaptc.weights import Held, seeded

EPSILONS = 512
"""Tolerated error, in units of the dtype's machine epsilon, relative to the largest output: rounding of some
hundred operations in another order, and far below what a wrong rewrite makes."""
HALF_EPSILONS = 8
"""The same for float16 and bfloat16, whose products are summed in float32."""
SIZES = ((2, 5, 4, 3, 6, 7, 8), (1, 1, 1, 1, 1, 1, 1), EXAMPLE_SIZES)
"""Sizes of the named dimensions: small and other than those traced, one of each, and those traced."""
TRIES, FEW_TRIES, MORE_ROWS = 16, 3, 16
"""Random inputs on which a trained parameter must get a gradient once. After a few of the traced sizes, the first
dimension is 16 times longer: some 10,000 tokens of a language model in all."""
Runner = Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Proof:
    """What was compared, on which shapes, and how far apart it was.

    `absolute` and `relative` are the largest over all outputs and shapes; `relative` is over the largest
    reference value of that output.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float
    shapes: tuple[str, ...]

    def __str__(self) -> str:
        held = f"{self.name}: largest error {self.relative:.1e} of {self.tolerance:.1e} allowed"
        return f"{held}, on {', '.join(self.shapes)}"


def tolerance(graph: Graph) -> float:
    """The tolerated relative error, by the narrowest dtype of the parameters."""
    parameters = [w for name, w in graph.weights.items() if name not in graph.buffers]
    kinds = [w.dtype for w in parameters if w.dtype.is_floating_point] or [torch.float32]
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    return EPSILONS * epsilon if epsilon < 1e-6 else HALF_EPSILONS * epsilon


def prove(
    name: str,
    inputs: Sequence[InputSpec],
    reference: Runner,
    candidate: Runner,
    allowed: float,
    seed: int = 0,
) -> Proof:
    """Run both sides on fresh random inputs of several shapes, padded rows among them.

    Raises:
        ProofError: the sides differ by more than the tolerance, or one is not finite where the other is; or
            the reference itself runs on none of the shapes.
    """
    absolute = relative = 0.0
    shapes: list[str] = []
    failure: Exception | None = None
    for number, among in enumerate(SIZES):
        sizes = example_sizes(inputs, among)
        label = " ".join(f"{k}={v}" for k, v in sizes.items()) or "fixed sizes"
        if label in shapes:
            continue
        tensors = example_tensors(inputs, sizes, seed=seed + number, pad=True)
        try:
            expected = reference(tensors)
        except Exception as error:  # the model itself does not take this size
            failure = error
            continue
        try:
            got = candidate(tensors)
        except Exception as error:
            raise ProofError(f"{name}: it does not run ({label}): {error}") from error
        if len(expected) != len(got):
            raise ProofError(f"{name}: {len(expected)} outputs became {len(got)}")
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a.shape != b.shape:
                raise ProofError(
                    f"{name}: output {index} is {list(b.shape)}, expected {list(a.shape)} ({label})"
                )
            error, scale = _error(a, b)
            absolute, relative = max(absolute, error), max(relative, error / scale)
        shapes.append(label)
    if not shapes:
        raise ProofError(f"{name}: the model runs on none of the proof's shapes: {failure}")
    proof = Proof(name, absolute, relative, allowed, tuple(shapes))
    if not relative <= allowed:
        raise ProofError(f"the proof failed: {proof}")
    return proof


def _error(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    a, b = a.detach().double(), b.detach().double()
    if a.isnan().any() or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf"), 1.0
    mask = torch.isfinite(a)
    if not mask.any():
        return 0.0, 1.0
    a, b = a[mask], b[mask]
    return float((a - b).abs().max()), max(float(a.abs().max()), 1e-12)


def runner(module: torch.nn.Module) -> Runner:
    """Run a module in evaluation mode and flatten its outputs."""

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        with evaluating(module), torch.no_grad():
            result = module(**tensors)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

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


def effect(inputs: Sequence[InputSpec], reference: Runner, candidate: Runner) -> float:
    """How far apart two sides are on the shapes that are traced, relative to the largest value."""
    tensors = example_tensors(inputs, example_sizes(inputs))
    pairs = zip(reference(tensors), candidate(tensors), strict=True)
    return max((error / scale for error, scale in (_error(a, b) for a, b in pairs)), default=0.0)


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


def _backward(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], seed: int) -> None:
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
