"""Words that an initialisation starts from, turned into numbers by the base's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from adaptc.graph import Graph
from adaptc.insert import Insert
from adaptc.kinds import InputMethod
from adaptc.spec import Spec


def with_words(spec: Spec, graph: Graph, index: int, item: Insert[Any]) -> Insert[Any]:
    """What is inserted, with its words as numbers of tokens.

    Raises:
        SpecError: the base has no tokenizer.
    """
    method = item.method
    if not isinstance(method, InputMethod) or not method.texts:
        return item
    origin = graph.source.pretrained
    tokenize = _tokenizer(origin) if origin is not None else None
    if origin is None or tokenize is None:
        words = f"{method.name} starts from words, and {graph.source.describe} has no tokenizer"
        raise spec.error(
            ("adapt", index),
            words,
            "save one beside the model, or give the numbers: init_tokens: [[7], [12]]",
        )
    labels = [str(name) for _, name in sorted((getattr(origin.config, "id2label", None) or {}).items())]
    return replace(item, method=method.tokenized(tokenize, labels))


def _tokenizer(origin: Any) -> Callable[[str, bool], Sequence[int]] | None:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(origin.name, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return lambda text, special: found(text, add_special_tokens=special)["input_ids"]
