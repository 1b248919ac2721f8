"""Methods that start from texts: the texts become numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from adaptc.ir.base import Pretrained
from adaptc.ir.graph import Graph
from adaptc.methods.virtual_tokens import InputMethod
from adaptc.optional import optional
from adaptc.rewriter.insert.base import Insert
from adaptc.spec.spec import Spec


def tokenized(spec: Spec, graph: Graph, index: int, item: Insert[Any, Any]) -> Insert[Any, Any]:
    """The pass with its method's texts as numbers of tokens, where the method starts from texts.

    Raises:
        SpecError: the base has no tokenizer.
    """
    method = item.method
    if not isinstance(method, InputMethod) or not method.texts:
        return item
    origin = graph.source.pretrained
    tokenize = _tokenizer(origin) if origin is not None else None
    if origin is None or tokenize is None:
        message = f"{method.name} starts from words, and {graph.source.describe} has no tokenizer"
        advice = "save one beside the model, or give the numbers: init_tokens: [[7], [12]]"
        raise spec.error(spec.place(index), message, advice)
    by_number: dict[int, Any] = getattr(origin.config, "id2label", None) or {}
    labels = [str(by_number[number]) for number in sorted(by_number)]
    return replace(item, method=method.tokenized(tokenize, labels))


def _tokenizer(origin: Pretrained) -> Callable[[str, bool], Sequence[int]] | None:
    """The model's tokenizer, called with a text and whether to add special tokens; None if it has none."""
    auto = optional("transformers").AutoTokenizer
    try:
        tokenizer: Any = auto.from_pretrained(origin.transformer, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None

    def tokenize(text: str, special: bool) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    return tokenize
