"""The gradient of every trained parameter: one that never gets any would be trained in vain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils import _pytree as pytree

from adaptc.compiler.proof.runners import evaluating
from adaptc.errors import ProofError
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch

TRIES, FEW_TRIES, MORE_ROWS = 16, 3, 16
"""A trained parameter must get a gradient on one of `TRIES` random inputs. After the first `FEW_TRIES` of the traced
sizes, the first dimension is `MORE_ROWS` times longer: some 10,000 tokens of a language model in all."""


class _NotRunError(ProofError):
    """The model does not take an input."""


def gradients(module: torch.nn.Module, graph: Graph, names: Sequence[str]) -> None:
    """Check that every trained parameter gets a gradient on a person's own inputs, or one of `TRIES` random ones.

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
    for seed, tensors in enumerate(_inputs(graph)):
        try:
            _backward(module, tensors, seed)
        except _NotRunError:
            if seed < len(graph.examples) or not graph.examples:
                raise
            continue  # a random input that the model does not take
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


def _inputs(graph: Graph) -> Iterator[Batch]:
    """A person's own inputs, then random ones."""
    yield from graph.examples.values()
    sizes = example_sizes(graph.inputs)
    for seed in range(1, 1 + TRIES):
        if seed == 1 + FEW_TRIES:
            sizes |= {name: size * MORE_ROWS for name, size in list(sizes.items())[:1]}
        yield example_tensors(graph.inputs, sizes, seed=seed)


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
        raise _NotRunError(f"the model does not run on its own inputs: {error}") from error
    # Random weights on the outputs: a plain sum has no gradient through a softmax or a layer norm.
    generator = torch.Generator().manual_seed(seed)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    terms = [(leaf * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)).sum() for leaf in trained]
    if not terms:
        raise ProofError("no output depends on a trained parameter")
    torch.autograd.backward(sum(terms[1:], terms[0]))
