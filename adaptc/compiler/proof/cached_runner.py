"""A program with a cache as a side of a proof: it is fed the tokens of a batch in several calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from adaptc.compiler.proof.runners import BatchRunner, Runner
from adaptc.emit.onnx.cached import read_outputs, read_signature
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.inputs import InputSpec
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import CacheSignature, past_of

Schedule = Callable[[int], Sequence[int]]
"""From the number of tokens in a text to the number of tokens of each call."""


def _chunks(count: int) -> list[int]:
    first = (count + 1) // 2
    second = (count - first + 1) // 2
    return [n for n in (first, second, count - first - second) if n]


SCHEDULES: dict[str, Schedule] = {
    "the prompt whole": lambda count: [count],
    "in chunks": _chunks,
    "token by token": lambda count: [1] * count,
}
"""How the tokens of a batch are fed, from an empty past: a name -> a schedule."""


@dataclass(frozen=True)
class EncoderRunner:
    """Runs an encoder.

    Attributes:
        runner: runs its program.
        outputs: the names of that program's outputs.
    """

    runner: Runner
    outputs: Sequence[str]

    def on(self, batches: Batches) -> dict[str, Batch | Exception]:
        """What a decoder takes, by the names of its inputs, for each batch; or the error of a batch."""
        names = [past_of(name) for name in self.outputs]
        return {
            label: outcome if isinstance(outcome, Exception) else dict(zip(names, outcome, strict=True))
            for label, outcome in self.runner.on(batches).outcomes.items()
        }


@dataclass(frozen=True)
class CachedRunner:
    """A runner that feeds each batch, which is for all tokens, in several calls.

    The outputs are those for all tokens. Where a mask hides a position, its outputs mean nothing.

    Attributes:
        steps: runs the calls; its outcomes have the outputs in the order of the signature.
        signature: what the program takes and gives.
        schedule: how many tokens each call gets.
        encoder: runs the encoder once for each batch, where the program takes its keys and values.
        buffers: whether keys and values stay in one buffer, with room for all tokens from the start.
    """

    steps: Runner
    signature: CacheSignature
    schedule: Schedule
    encoder: EncoderRunner | None = None
    buffers: bool = False

    def on(self, batches: Batches) -> Run:
        """One run of every batch; a batch whose call fails has that error."""
        encoded = self.encoder.on(batches) if self.encoder is not None else {}
        texts = {label: _Text(self, batch, encoded.get(label, {})) for label, batch in batches.items()}
        run = Run({}, {})
        while calls := {label: text.next_call() for label, text in texts.items() if text.goes_on}:
            run = self.steps.on(calls)
            for label, outcome in run.outcomes.items():
                texts[label].take(outcome)
        outcomes = {label: text.outcome() for label, text in texts.items()}
        return replace(
            run, batches=batches, outcomes=outcomes, outputs=tuple(self.signature.results), choices={}
        )


class _Text:
    """A batch whose tokens are fed in several calls.

    Args:
        runner: the runner that feeds it.
        batch: for all tokens.
        encoded: what the encoder gave for it, or its error.
    """

    def __init__(self, runner: CachedRunner, batch: Batch, encoded: Batch | Exception):
        self.signature, self.batch = runner.signature, batch
        self.encoded: Batch = {} if isinstance(encoded, Exception) else encoded
        count = self.signature.count(batch)
        self.ends = list(accumulate(runner.schedule(count)))
        self.past = self.signature.empty(self.signature.sequences(batch), count if runner.buffers else 0)
        self.steps: list[dict[str, torch.Tensor]] = []
        self.error = encoded if isinstance(encoded, Exception) else None

    @property
    def goes_on(self) -> bool:
        """Whether there are tokens left."""
        return self.error is None and len(self.steps) < len(self.ends)

    def next_call(self) -> Batch:
        """The inputs of the next call."""
        number = len(self.steps)
        start = self.ends[number - 1] if number else 0
        return {**self.signature.part(self.batch, start, self.ends[number]), **self.past, **self.encoded}

    def take(self, outcome: Outcome) -> None:
        """Take what the call gave."""
        if isinstance(outcome, Exception):
            self.error = outcome
            return
        outputs = dict(zip(self.signature.outputs, outcome, strict=True))
        self.past = self.signature.next_past(outputs)
        self.steps.append({name: outputs[name] for name in self.signature.results})

    def outcome(self) -> Outcome:
        """The outputs for all tokens, or the error."""
        return self.error or self.signature.whole(self.steps)


def masks_of(signature: CacheSignature) -> list[InputSpec]:
    """The masks of a program: inputs `(batch, total)`."""
    return [spec for spec in signature.inputs if spec.dims[1:] == (TOTAL,)]


def takes(signature: CacheSignature, schedule: Schedule, batch: Batch) -> bool:
    """Whether a program takes a batch in calls of these numbers of tokens."""
    if not signature.counted or signature.sequences(batch) == 1:
        return True
    _, *behind_a_past = schedule(signature.count(batch))
    return set(behind_a_past) <= {1}


def in_calls(signature: CacheSignature) -> Schedule:
    """The schedule with the fewest calls behind a past that a program takes for any batch."""
    return SCHEDULES["token by token" if signature.counted else "in chunks"]


def shown(signature: CacheSignature, batches: Batches) -> Batches:
    """The batches that a program is proved on: those given, and others that are padded as it takes them."""
    if not signature.counted:
        padded = {label: padded_left(signature, batch) for label, batch in batches.items()}
        left = {f"{label} padded on the left": batch for label, batch in padded.items() if batch is not None}
        return {**batches, **left}
    right = {label: _padded_right(signature, batch) for label, batch in batches.items()}
    rows = {
        f"{label}, its first row": _first_row(signature, batch)
        for label, batch in batches.items()
        if signature.count(batch) > 1 and signature.sequences(batch) > 1
    }
    return {**right, **rows}


def _padded_right(signature: CacheSignature, batch: Batch) -> Batch:
    """A batch whose masks hide as many tokens as they do, behind the others."""
    counts = {mask.name: batch[mask.name].bool().sum(1, keepdim=True) for mask in masks_of(signature)}
    right = {
        name: (torch.arange(batch[name].shape[1])[None] < count.clamp(min=1)).to(batch[name].dtype)
        for name, count in counts.items()
    }
    return {**batch, **right}


def _first_row(signature: CacheSignature, batch: Batch) -> Batch:
    """The first sequence of a batch, none of it hidden."""
    dim = signature.pasts[0].dims[0]
    axes = {spec.name: spec.dims.index(dim) for spec in signature.inputs if dim in spec.dims}
    row = {name: value.narrow(axes[name], 0, 1) if name in axes else value for name, value in batch.items()}
    return {**row, **{mask.name: torch.ones_like(row[mask.name]) for mask in masks_of(signature)}}


def padded_left(signature: CacheSignature, batch: Batch) -> Batch | None:
    """A batch whose rows are padded on the left, as texts of different lengths are for generation.

    Row `i` hides its first `i` tokens, up to all but one; positions count what is seen. None where the program has no
    mask, or the batch is one row or one token.
    """
    masks = masks_of(signature)
    if not masks or signature.count(batch) < 2 or signature.sequences(batch) < 2:
        return None
    rows, count = batch[masks[0].name].shape
    hidden = torch.arange(rows).clamp(max=count - 1)[:, None]
    seen = torch.arange(count)[None] >= hidden
    padded = {**batch, **{mask.name: seen.to(batch[mask.name].dtype) for mask in masks}}
    if "position_ids" in batch:
        positions = (seen.long().cumsum(1) - 1).clamp(min=0)
        padded["position_ids"] = positions.to(batch["position_ids"].dtype)
    return padded


def where_seen(signature: CacheSignature, reference: Run, candidate: Run) -> Run:
    """A candidate's run, with the reference's values at the positions that a mask hides: they mean nothing."""
    outcomes = dict(candidate.outcomes)
    masks = [mask.name for mask in masks_of(signature)]
    for label, batch in reference.taken.items():
        expected, got = reference.outcomes[label], candidate.outcomes[label]
        if masks and not isinstance(expected, Exception) and not isinstance(got, Exception):
            seen = batch[masks[0]].bool()
            pairs = zip(signature.results, expected, got, strict=True)
            outcomes[label] = [_seen(signature, name, seen, a, b) for name, a, b in pairs]
    return replace(candidate, outcomes=outcomes)


def without_hidden(signature: CacheSignature, run: Run) -> Run:
    """A run with zeros at the positions that a mask hides: they mean nothing."""
    zeros = {
        label: outcome if isinstance(outcome, Exception) else [torch.zeros_like(value) for value in outcome]
        for label, outcome in run.outcomes.items()
    }
    return where_seen(signature, replace(run, outcomes=zeros), run)


@dataclass(frozen=True)
class SeenRunner:
    """A runner whose outputs are zeros at the positions that a mask hides.

    Attributes:
        runner: gives the outputs for all tokens.
        signature: of its program.
    """

    runner: Runner
    signature: CacheSignature

    def on(self, batches: Batches) -> Run:
        """One run of every batch."""
        return without_hidden(self.signature, self.runner.on(batches))


def _seen(
    signature: CacheSignature, name: str, seen: torch.Tensor, expected: torch.Tensor, got: torch.Tensor
) -> torch.Tensor:
    dims = signature.outputs[name]
    if dims[:2] != (signature.pasts[0].dims[0], signature.new) or expected.shape != got.shape:
        return got
    return torch.where(seen.view(*seen.shape, *[1] * (got.dim() - 2)), got, expected)


def in_chunks(path: Path, runner: Runner) -> Runner:
    """A runner of an ONNX file that feeds it in chunks where it has a cache, token by token if need be; or as it is."""
    signature = read_signature(path)
    if signature is None:
        return runner
    encoder = None
    if signature.encoder is not None:
        file = path.with_name(signature.encoder)
        encoder = EncoderRunner(BatchRunner(onnx_runner(file)), read_outputs(file))
    return SeenRunner(CachedRunner(runner, signature, in_calls(signature), encoder), signature)
