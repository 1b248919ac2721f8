"""Methods that name words: the words become numbers of tokens; and texts in the template of such a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptc.errors import AdaptcError, InputError
from adaptc.ir.base import Pretrained
from adaptc.ir.graph import Graph
from adaptc.methods.head import HeadMethod
from adaptc.methods.virtual_tokens import InputMethod
from adaptc.optional import optional
from adaptc.rewriter.insert.base import Insert
from adaptc.spec.spec import Spec


def tokenized(spec: Spec, graph: Graph, index: int, item: Insert[Any, Any]) -> Insert[Any, Any]:
    """The pass with its method's texts as numbers of tokens, where the method names words.

    Raises:
        SpecError: the base has no tokenizer, or not the tokens that the method needs.
    """
    method = item.method
    if not isinstance(method, InputMethod | HeadMethod) or not method.texts:
        return item
    origin = graph.source.pretrained
    tokenizer = _tokenizer(origin) if origin is not None else None
    if origin is None or tokenizer is None:
        heads = isinstance(method, HeadMethod)
        does = "names words" if heads else "starts from words"
        message = f"{method.name} {does}, and {graph.source.describe} has no tokenizer"
        numbers = "label_tokens: [[7], [12]], mask_token: 4" if heads else "init_tokens: [[7], [12]]"
        advice = f"save one beside the model, or give the numbers: {numbers}"
        raise spec.error(spec.place(index), message, advice)
    if isinstance(method, HeadMethod):
        try:
            return replace(item, method=method.tokenized(*_tokens_of(tokenizer)))
        except InputError as error:
            raise spec.error(spec.place(index), error.message, *error.notes) from None
    by_number: dict[int, Any] = getattr(origin.config, "id2label", None) or {}
    labels = [str(by_number[number]) for number in sorted(by_number)]

    def tokenize(text: str, special: bool) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    return replace(item, method=method.tokenized(tokenize, labels))


def filled(graph: Graph, rows: Sequence[str | Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """The inputs of a model for texts in the template of its head.

    Args:
        graph: the adapted graph.
        rows: a text, or one for each slot, by its name.

    Returns:
        what the tokenizer gives of the model's inputs, padded to one length.

    Raises:
        AdaptcError: no head has a template, a slot is missing, or the mask of a row is cut off.
    """
    heads = [a.method for a in graph.adaptations if isinstance(a.method, HeadMethod) and a.method.template]
    origin = graph.source.pretrained
    tokenizer = _tokenizer(origin) if origin is not None else None
    if not heads or tokenizer is None:
        lacking = "head with a template" if not heads else "tokenizer"
        raise AdaptcError(f"the model has no {lacking}, so that texts cannot be filled in")
    (head, *_) = heads
    texts = [_filled(head.template, row, str(tokenizer.mask_token)) for row in rows]
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    lost = (given["input_ids"] != head.token).all(1).nonzero().flatten().tolist()
    if lost:
        raise AdaptcError(
            f"row {lost[0]} is longer than the model reads, and its mask is cut off: shorten it"
        )
    names = {spec.name for spec in graph.inputs}
    return {name: tensor for name, tensor in given.items() if name in names}


def _filled(template: str, row: str | Mapping[str, str], mask: str) -> str:
    """A template with the texts of a row in its slots."""
    texts = {"text": row} if isinstance(row, str) else dict(row)
    try:
        return template.format(**texts, mask=mask)
    except (KeyError, IndexError) as error:
        raise AdaptcError(
            f"the template {template!r} has the slot {error}, and a row has {', '.join(texts)}"
        ) from None


def _tokens_of(tokenizer: Any) -> tuple[Callable[[str], int], int]:
    """What gives the number of a word that is one token, and the number of the mask token.

    Raises:
        InputError: there is no mask token; or, from the function, a word is no token.
    """
    mask: int | None = tokenizer.mask_token_id
    if mask is None:
        raise InputError("words at a mask need a masked language model, and this tokenizer has no mask token")

    def number_of(word: str) -> int:
        spellings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        single = [ids[0] for ids in spellings if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
        if not single:
            raise InputError(
                f"{word!r} is no single token of the model: take a word that is", "such as good or bad"
            )
        return single[0]

    return number_of, mask


def _tokenizer(origin: Pretrained) -> Any:
    """The model's tokenizer; None if it has none."""
    auto = optional("transformers").AutoTokenizer
    try:
        return auto.from_pretrained(origin.transformer, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None
