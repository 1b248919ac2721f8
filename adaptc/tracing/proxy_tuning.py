"""Proxy-tuning: a large model steered by a small one, tuned and untuned, as one model that is traced.

`logits = base(x) + α (tuned(x) - untuned(x))`        Liu et al. 2024, section 3.1

The three share a vocabulary. The small models are children of the base, `tuned` and `untuned`, which keeps its names.
"""

# The children, and the tensors of a module, are replaced in torch's own dicts, as `huggingface` does.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from adaptc.errors import TraceError
from adaptc.ir.base import Base, Bound, Pretrained
from adaptc.optional import optional
from adaptc.tracing.huggingface.model import fake_mode_of, fake_tensors

TUNED, UNTUNED = "tuned", "untuned"
"""The names of the small models below the base."""


def proxy_tuned(base: Base, tuned: Base, untuned: Base, alpha: float) -> Base:
    """The base that is steered by two small models, as a base of its own.

    Args:
        base: the large model; its inputs are those of all three.
        tuned: the small model after its tuning.
        untuned: the small model before.
        alpha: how strongly it is steered.

    Raises:
        TraceError: vocabularies differ, or a small model takes an input that the base does not.
    """
    parts = {TUNED: tuned, UNTUNED: untuned}
    for name, part in parts.items():
        _check_vocabulary(base, part, name)
        lacking = [spec.name for spec in part.inputs if spec.name not in {spec.name for spec in base.inputs}]
        if lacking:
            raise TraceError(f"the {name} model takes {', '.join(lacking)}, which the base does not")

    def find() -> Bound:
        bound = base.bound
        weights, notes = dict(bound.weights), list(bound.notes)
        for name, part in parts.items():
            weights |= {f"{name}.{key}": weight for key, weight in part.bound.weights.items()}
            notes += [f"{name}: {note}" for note in part.bound.notes]
        return Bound(weights, tuple(notes))

    packed = {f"{name}.{key}": w for name, part in parts.items() for key, w in part.packed.items()}
    return replace(
        base,
        describe=f"{base.describe}, proxy-tuned by {tuned.describe} and {untuned.describe}",
        model=_join(base, parts, alpha),
        find=find,
        files=tuple(file for each in (base, tuned, untuned) for file in each.files),
        heads=_heads(base, parts),
        packed={**base.packed, **packed},
        notes=[*base.notes, *(f"{name}: {note}" for name, part in parts.items() for note in part.notes)],
        beside=(TUNED, UNTUNED),
    )


def _heads(base: Base, parts: Mapping[str, Base]) -> frozenset[str] | None:
    """The output heads of all three; None where nobody says which the base's are."""
    if base.heads is None:
        return None
    return base.heads | {f"{name}.{head}" for name, part in parts.items() for head in part.heads or ()}


def _join(base: Base, parts: Mapping[str, Base], alpha: float) -> nn.Module:
    """A copy of the base's model with the small models as children, whose `forward` gives the logits of all three."""
    large = cast("nn.Module", base.model)
    joined = copy.copy(large)
    joined._modules = dict(large._modules)
    mode = fake_mode_of(large)
    for name, part in parts.items():
        small = cast("nn.Module", part.model)
        fake_tensors(small, mode)
        joined.add_module(name, small)
    kind = type(large)
    taken = {name: [spec.name for spec in part.inputs] for name, part in parts.items()}
    forward = _forward(kind, taken, alpha)
    joined.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return joined


def _forward(kind: type[nn.Module], taken: Mapping[str, list[str]], alpha: float) -> Any:
    """The `forward` of a base of this class; `taken` are the inputs of its small models by their names."""
    signature = inspect.signature(kind.forward)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        arguments = signature.bind(self, *args, **inputs).arguments
        given = {**arguments, **arguments.get("kwargs", {})}
        logits: Tensor = kind.forward(self, *args, **inputs).logits
        tuned, untuned = (
            self.get_submodule(name)(**{key: given[key] for key in names}).logits
            for name, names in taken.items()
        )
        return {"logits": logits + (alpha * (tuned - untuned)).to(logits.dtype)}

    return forward


def _check_vocabulary(base: Base, part: Base, name: str) -> None:
    """Check that a small model reads and predicts the tokens that the base does.

    Raises:
        TraceError: it does not.
    """
    large, small = (_pretrained(each) for each in (base, part))
    sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (large, small)]
    if sizes[0] != sizes[1]:
        raise TraceError(
            f"the vocabularies differ: the base has {sizes[0]} tokens, the {name} model {sizes[1]}",
            "proxy-tuning adds logits token by token: take small models of the base's family",
        )
    tokens = [_tokens(each) for each in (large, small)]
    if tokens[0] is None or tokens[1] is None or tokens[0] == tokens[1]:
        return
    numbers = [tokens[0], tokens[1]]
    differing = (w for w in {**numbers[0], **numbers[1]} if numbers[0].get(w) != numbers[1].get(w))
    word = min(differing, key=lambda w: (numbers[0].get(w, len(numbers[0])), w))
    raise TraceError(
        f"the vocabularies differ: {word!r} is token {numbers[0].get(word)} of the base, and {numbers[1].get(word)} of "
        f"the {name} model",
        "proxy-tuning adds logits token by token: take small models of the base's family",
    )


def _pretrained(base: Base) -> Pretrained:
    assert base.pretrained is not None
    return base.pretrained


def _tokens(origin: Pretrained) -> dict[str, int] | None:
    """The numbers of the words of a model's tokenizer; None where it has none that can be read."""
    auto = optional("transformers").AutoTokenizer
    try:
        tokenizer: Any = auto.from_pretrained(origin.transformer, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return dict(tokenizer.get_vocab())
