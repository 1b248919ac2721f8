"""A product on a text: its base's tokenizer in front, and what its task means behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.generation.onnx import OnnxDecoder, base_in
from adaptc.generation.texts import Tokenizer
from adaptc.inputs import InputSpec
from adaptc.optional import optional
from adaptc.products.prediction import Prediction, Scored
from adaptc.products.product import Tensors, product_at

TOP = 5
"""How many tokens are shown."""
LONGEST_ANSWER = 30
"""The most tokens of an answer that is a part of the text."""


class Predictor:
    """A product that takes texts.

    Args:
        path: an ONNX program, a torch artifact or a Hugging Face checkpoint.
        tokenizer: a directory, or hub id; the base's if left out.

    Raises:
        SpecError: there is no product at the path, or its task is not one of texts.
        AdaptcError: it cannot be loaded, or there is no tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None):
        product = product_at(Path(path))
        self.product, self.task = product, str(product.base.get("task", ""))
        if product.format == "genai":
            message, advice = "onnxruntime-genai alone runs it", f"adaptc generate {path} --prompt ..."
            raise SpecError([Problem(message, file=str(path), notes=(advice,))])
        if self.task not in READ:
            raise _no_task(path, self.task)
        self._base = tokenizer or base_in(product.entry, product.path)
        self.tokenizer = Tokenizer(self._base)
        self._decoder = OnnxDecoder(product.path, self._base) if product.cached else None
        self._inputs = product.inputs()
        self._call = None if self._decoder is not None else product.open()

    def __call__(self, text: str, pair: str | None = None) -> Prediction:
        """What the product says of a text.

        Args:
            text: the text; of `question-answering` the question.
            pair: a second text, where the task takes one: of `question-answering` the text that holds the answer. Of
                embeddings it is embedded too, and compared.

        Raises:
            AdaptcError: the product takes more than texts give, or the text is longer than it takes.
        """
        if self._decoder is not None:
            if pair is not None:
                raise _no_pair(self.task)
            scores = self._decoder.next_scores(self._decoder.tokens(text, chat=False))
            return Prediction(self.task, text, None, self.top_tokens(scores))
        return READ[self.task](self, text, pair)

    @cached_property
    def config(self) -> Any:
        """The configuration of the base, with what the spec overrides."""
        return optional("transformers").AutoConfig.from_pretrained(
            str(self.product.path) if self.product.format == "hf" else self._base,
            **self.product.base.get("config", {}),
        )

    @property
    def labels(self) -> Mapping[int, str]:
        """The number of a class -> its name, as the configuration has them."""
        names: Mapping[Any, Any] = self.config.id2label
        return {int(number): str(name) for number, name in names.items()}

    def encoded(self, text: str, pair: str | None = None) -> dict[str, torch.Tensor]:
        """A text as the tensors that the product takes, a batch of one.

        Raises:
            AdaptcError: the product takes more than the tokenizer gives.
        """
        options: dict[str, Any] = {"return_tensors": "pt"}
        length = next((spec.dims[1] for spec in self._inputs if len(spec.dims) == 2), None)
        if isinstance(length, int):
            options |= {"padding": "max_length", "truncation": True, "max_length": length}
        names = [spec.name for spec in self._inputs]
        given: Mapping[str, torch.Tensor] = self.tokenizer.own(text, pair, **options)
        values = {**given, "position_ids": torch.arange(given["input_ids"].shape[1])[None]}
        lacking = [f"{spec.name} {spec}" for spec in self._inputs if spec.name not in values]
        if lacking:
            raise AdaptcError(
                f"{self.product.path}: it takes {', '.join(lacking)}, and a text gives {', '.join(given)} alone"
            )
        return {name: _cast(values[name], spec) for name, spec in zip(names, self._inputs, strict=True)}

    def outputs(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The product's outputs by name.

        Raises:
            AdaptcError: it does not run on such a text.
        """
        assert self._call is not None
        try:
            return self._call(tensors)
        except Exception as error:  # whatever a runtime raises
            size = next(iter(tensors.values())).shape[-1]
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise AdaptcError(
                f"{self.product.path}: it does not run on a text of {size} tokens: {reason}"
            ) from error

    def top_tokens(self, logits: torch.Tensor) -> tuple[Scored, ...]:
        """The likeliest tokens, by their logits (vocabulary,)."""
        best = logits.float().softmax(-1).topk(min(TOP, logits.shape[-1]))
        return tuple(
            Scored(repr(self.tokenizer.own.decode([int(token)])), float(score))
            for score, token in zip(best.values, best.indices, strict=True)
        )


def _cast(value: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    return value.to(getattr(torch, spec.dtype))


def _classes(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The classes of a text by their names; of a regression its value."""
    logits = predictor.outputs(predictor.encoded(text, pair))["logits"][0].float()
    labels = predictor.labels
    if logits.shape[-1] == 1:
        scored = [Scored(labels.get(0, "value"), float(logits[0]))]
    else:
        several = predictor.config.problem_type == "multi_label_classification"
        shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        scored = [Scored(labels.get(number, str(number)), share) for number, share in enumerate(shares)]
    ordered = tuple(sorted(scored, key=lambda each: -each.score))
    return Prediction(predictor.task, text, pair, ordered)


def _tokens(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The likeliest class of every token."""
    encoded = predictor.encoded(text, pair)
    shares = predictor.outputs(encoded)["logits"][0].float().softmax(-1)
    tokens: Sequence[str] = predictor.tokenizer.own.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    best = shares.max(-1)
    labels = predictor.labels
    rows = zip(tokens, best.values.tolist(), best.indices.tolist(), strict=True)
    special = set(predictor.tokenizer.own.all_special_tokens)
    scored = [Scored(labels.get(number, str(number)), share, token) for token, share, number in rows]
    return Prediction(predictor.task, text, pair, tuple(each for each in scored if each.token not in special))


def _answer(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The part of the second text that answers the first."""
    if pair is None:
        raise SpecError([Problem("question-answering needs the text that holds the answer", file="--pair")])
    encoded = predictor.encoded(text, pair)
    outputs = predictor.outputs(encoded)
    sequence: Sequence[int | None] = predictor.tokenizer.own(text, pair).sequence_ids(0)
    inside = torch.tensor([part == 1 for part in sequence])
    count = len(sequence)
    start, end = (
        outputs[name][0, :count].float().masked_fill(~inside, -torch.inf).softmax(-1)
        for name in ("start_logits", "end_logits")
    )
    spans = torch.outer(start, end).triu().tril(LONGEST_ANSWER - 1)
    best = int(spans.argmax())
    first, last = divmod(best, count)
    answer: str = predictor.tokenizer.own.decode(encoded["input_ids"][0, first : last + 1].tolist())
    return Prediction(predictor.task, text, pair, (Scored(answer, float(spans.flatten()[best])),))


def _embedding(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The embedding of a text, and how similar that of a second one is."""
    first = _embedded(predictor, text)
    similarity = None
    if pair is not None:
        similarity = float(F.cosine_similarity(first, _embedded(predictor, pair), dim=0))
    return Prediction(predictor.task, text, pair, embedding=tuple(first.tolist()), similarity=similarity)


def _embedded(predictor: Predictor, text: str) -> torch.Tensor:
    """A sentence's embedding, or the mean over its tokens of the last hidden state: (features,), float32."""
    encoded = predictor.encoded(text)
    outputs = predictor.outputs(encoded)
    value = outputs.get("last_hidden_state", next(iter(outputs.values())))[0].float()
    if value.dim() == 1:
        return value
    mask = encoded.get("attention_mask", torch.ones(1, value.shape[0]))[0, :, None].float()
    return (value * mask).sum(0) / mask.sum()


def _next(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The likeliest tokens that follow a text."""
    if pair is not None:
        raise _no_pair(predictor.task)
    encoded = predictor.encoded(text)
    last = int(encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))[0].sum()) - 1
    logits = predictor.outputs(encoded)["logits"][0, last]
    return Prediction(predictor.task, text, None, predictor.top_tokens(logits))


def _masked(predictor: Predictor, text: str, pair: str | None) -> Prediction:
    """The likeliest tokens in the place of the first mask."""
    encoded = predictor.encoded(text, pair)
    tokenizer = predictor.tokenizer.own
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    if not len(places):
        raise SpecError([Problem(f"there is no {tokenizer.mask_token} in the text", file="--text")])
    logits = predictor.outputs(encoded)["logits"][0, int(places[0])]
    return Prediction(predictor.task, text, pair, predictor.top_tokens(logits))


READ: Mapping[str, Callable[[Predictor, str, str | None], Prediction]] = {
    "sequence-classification": _classes,
    "token-classification": _tokens,
    "question-answering": _answer,
    "sentence-embedding": _embedding,
    "feature-extraction": _embedding,
    "text-encoding": _embedding,
    "causal-lm": _next,
    "masked-lm": _masked,
}
"""Task -> what a product of it says of a text."""


def _no_task(path: str | Path, task: str) -> SpecError:
    has = f"its task is {task}" if task else "its base is no Hugging Face model, which has a task"
    advice = f"a text says something to: {', '.join(READ)}"
    return SpecError([Problem(f"{has}, so a text alone is not read", file=str(path), notes=(advice,))])


def _no_pair(task: str) -> SpecError:
    return SpecError([Problem(f"{task} continues one text; leave the second out", file="--pair")])


def predict(
    path: str | Path, text: str, pair: str | None = None, *, tokenizer: str | None = None
) -> Prediction:
    """What a product says of a text, as `adaptc run` shows it. For several texts make a `Predictor` once.

    Args:
        path: an ONNX program, a torch artifact or a Hugging Face checkpoint.
        text: the text.
        pair: a second text, see `Predictor`.
        tokenizer: a directory, or hub id; the base's if left out.

    Raises:
        SpecError: there is no product at the path, or its task is not one of texts.
        AdaptcError: it cannot be loaded, there is no tokenizer, or the text is longer than it takes.
    """
    return Predictor(path, tokenizer)(text, pair)
