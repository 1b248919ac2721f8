"""Texts written by a decoder in one way or another, the likeliest token each, with the logits of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.proof.cached_runner import EncoderRunner
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.emit.onnx.cached import read_outputs, read_signature
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.generation.genai import PLAIN, GenaiModel
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import dtype
from benchmarks.decoder_models import Model

NEW = 100
"""The tokens that are written behind each prompt."""
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "max_new_tokens": NEW,
    "eos_token_id": -1,
    "pad_token_id": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
"""What transformers' `generate` is told: no token ends a text."""


@dataclass(frozen=True)
class Text:
    """What was written behind a prompt.

    Attributes:
        tokens: the new tokens.
        logits: of each step, `(tokens, words)`, float32.
    """

    tokens: list[int]
    logits: torch.Tensor


Write = Callable[[Model, Sequence[int]], list[Text]]
"""From a model and the numbers of some of its prompts to what one batch of these is continued with."""


def padded(rows: Sequence[Sequence[int]], behind: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids in one tensor, shorter rows padded in front or behind, and the mask that hides the pads."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest).long(), torch.zeros(len(rows), longest).long()
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if behind else slice(longest - len(row), longest)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def texts_of(steps: Sequence[torch.Tensor]) -> list[Text]:
    """The texts of a batch from the logits `(batch, words)` of each step."""
    logits = torch.stack([step.float() for step in steps], 1)
    return [Text(row.argmax(-1).tolist(), row) for row in logits]


def without_cache(module: Any, inputs: Sequence[str]) -> Write:
    """Every token from a run of all tokens before it.

    Args:
        module: gives logits, or what has them.
        inputs: the names of what it takes.
    """

    def write(one: Model, chosen: Sequence[int]) -> list[Text]:
        ids, steps = torch.tensor([one.prompts[n] for n in chosen]), list[torch.Tensor]()
        given = {name: value[list(chosen)] for name, value in one.given.items() if name in inputs}
        while len(steps) < NEW:
            places = torch.arange(ids.shape[1]).expand_as(ids)
            text = {one.ids: ids, "position_ids": places, "attention_mask": torch.ones_like(ids), **given}
            with torch.no_grad():
                result = module(**{name: value for name, value in text.items() if name in inputs})
            steps.append((result if isinstance(result, torch.Tensor) else result["logits"])[:, -1])
            ids = torch.cat([ids, steps[-1].argmax(-1)[:, None]], 1)
        return texts_of(steps)

    return write


def by_generate(generate: Callable[..., Any]) -> Write:
    """By transformers' `generate`, or a function that takes the same; shorter prompts are padded in front."""

    def write(one: Model, chosen: Sequence[int]) -> list[Text]:
        ids, mask = padded([one.prompts[n] for n in chosen])
        main, options = ids, {**GREEDY, "attention_mask": mask}
        if one.given:
            (name, main), *others = ((name, value[list(chosen)]) for name, value in one.given.items())
            options = {**GREEDY, **dict(others), "decoder_input_ids": ids}
            del name
        with torch.no_grad():
            result = generate(main, **options)
        texts = texts_of(result.logits)
        assert result.sequences[:, -NEW:].tolist() == [text.tokens for text in texts]
        return texts

    return write


def by_onnx(path: Path) -> Write:
    """By an ONNX program with a cache: the prompts, padded as it takes them, then token by token."""
    signature = read_signature(path)
    assert signature is not None
    call, encoder = onnx_runner(path, exact=True), None
    if signature.encoder is not None:
        file = path.with_name(signature.encoder)
        encoder = EncoderRunner(BatchRunner(onnx_runner(file, exact=True)), read_outputs(file))

    def write(one: Model, chosen: Sequence[int]) -> list[Text]:
        ids, mask = padded([one.prompts[n] for n in chosen], behind=signature.counted)
        given = {name: value[list(chosen)] for name, value in one.given.items()}
        if encoder is not None:
            encoded = encoder.on({"": given})[""]
            assert not isinstance(encoded, Exception), encoded
            given |= encoded
        last = mask.sum(1) - 1 if signature.counted else torch.full((len(ids),), ids.shape[1] - 1)
        places, past = (mask.cumsum(1) - 1).clamp(min=0), signature.empty(len(ids))
        steps: list[torch.Tensor] = []
        while len(steps) < NEW:
            text = {one.ids: ids, "position_ids": places, **given, **past}
            for spec in signature.inputs:
                if spec.dims[1:] == (TOTAL,):
                    text[spec.name] = mask.to(dtype(spec))
            outputs = dict(zip(signature.outputs, call(text), strict=True))
            past = signature.next_past(outputs)
            logits = outputs["logits" if "logits" in outputs else signature.results[0]]
            steps.append(logits[torch.arange(len(ids)), last])
            ids, last = steps[-1].argmax(-1)[:, None], torch.zeros_like(last)
            places = places.amax(1, keepdim=True) + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return texts_of(steps)

    return write


def by_genai(directory: Path) -> Write:
    """By onnxruntime-genai; shorter prompts are padded behind."""
    model = GenaiModel(directory)

    def write(one: Model, chosen: Sequence[int]) -> list[Text]:
        prompts = [one.prompts[n] for n in chosen]
        sound = one.given.get("input_features")
        heard = None if sound is None else sound[list(chosen)]
        generator, steps = model.generator(prompts, NEW, heard, **PLAIN), list[torch.Tensor]()
        tokens: list[Any] = []
        while not generator.is_done():
            logits = torch.from_numpy(generator.get_logits())
            steps.append(logits.reshape(len(prompts), -1, logits.shape[-1])[:, -1])
            generator.generate_next_token()
            tokens.append([int(token) for token in generator.get_next_tokens()])
        texts = texts_of(steps)
        return [
            Text(list(row), text.logits) for row, text in zip(zip(*tokens, strict=True), texts, strict=True)
        ]

    return write
