"""The decoders of the table: tiny random models of the families that write texts, and decoders written by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import adaptc
from benchmarks.bases import Family, families, make, peft_model
from tests.decoders import WIDE, WORDS

TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "speech-seq2seq": "SEQ_2_SEQ_LM"}
"""The tasks whose models write texts -> what PEFT calls them."""
LONGEST = 128
"""The most tokens of a text: the prompt, and what is written."""
FRAMES = 3000
"""What a model of sound hears: the number of frames that onnxruntime-genai takes."""
PREFIX = 3
"""The virtual tokens of a prefix."""
LENGTHS = (7, 4, 1)
"""The tokens of the three texts of a batch."""


@dataclass(frozen=True)
class Model:
    """A decoder, and the prompts that it continues.

    Attributes:
        name: as the table has it.
        eager: the model, in evaluation mode.
        base: what a spec says of it.
        prompts: the token ids of each text.
        batches: the numbers of the texts that are one batch.
        family: of transformers; None of a decoder written by hand.
        given: what an encoder takes, a row for each text, shorter ones padded behind.
    """

    name: str
    eager: Any
    base: Mapping[str, Any]
    prompts: Sequence[Sequence[int]]
    batches: Sequence[Sequence[int]]
    family: Family | None = None
    given: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @property
    def ids(self) -> str:
        """The input of token ids."""
        if self.family is None:
            return next(iter(self.base["inputs"]))
        return "decoder_input_ids" if self.given else "input_ids"

    def compile(self, entries: Mapping[str, Any]) -> adaptc.Compiled:
        """The model with these entries of a spec."""
        model = None if self.family is not None else copy.deepcopy(self.eager)
        return adaptc.compile({**self.base, **entries}, model=model)


def names() -> list[str]:
    """The decoders, by the names that the table has."""
    return [*(n for n, family in families().items() if family.task in TASKS), *(by_hand(n) for n in WIDE)]


def by_hand(name: str) -> str:
    """What the table calls a decoder written by hand."""
    return f"by hand: {name}"


def model(name: str) -> Model:
    """The decoder of a name."""
    generator = torch.Generator().manual_seed(3)
    if name not in families():
        return _by_hand(name, generator)
    family = families()[name]
    assert family.task is not None
    for length in ("max_position_embeddings", "n_positions", "max_target_positions"):
        if getattr(family.config, length, None) is not None:
            setattr(family.config, length, LONGEST)
    if name == "Whisper":
        family.config.max_source_positions = FRAMES // 2
    eager, directory = make(family)
    base = {"base": {"model": str(directory), "task": family.task}}
    vocabulary = family.config.vocab_size
    texts = [_tokens(vocabulary, length, generator) for length in LENGTHS]
    batches = [range(len(texts)), [len(texts) - 1]]
    if family.task == "causal-lm":
        return Model(name, eager, base, texts, batches, family)
    start = [[family.config.decoder_start_token_id]] * len(texts)
    return Model(name, eager, base, start, batches, family, _given(family, texts, generator))


def _by_hand(name: str, generator: torch.Generator) -> Model:
    """Written by hand: without a mask, so that the texts of a batch have one length."""
    cls = next(cls for key, cls in WIDE.items() if by_hand(key) == name)
    torch.manual_seed(0)
    eager = cls().eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    ids = "tokens" if name == by_hand("OtherName") else "input_ids"
    base = {"inputs": {ids: "int64[batch, seq]"}}
    texts = [_tokens(WORDS, length, generator) for length in (LENGTHS[0],) * 3 + (1,)]
    return Model(name, eager, base, texts, [range(3), [3]])


def _tokens(vocabulary: int, length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def _given(family: Family, texts: list[list[int]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What an encoder takes: features of sound, or texts and their mask."""
    if family.task == "speech-seq2seq":
        shape = (len(texts), family.config.num_mel_bins, FRAMES)
        return {"input_features": torch.randn(shape, generator=generator)}
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text)).long() for text in texts], batch_first=True)
    return {"input_ids": rows, "attention_mask": mask}


@dataclass(frozen=True)
class Adapted:
    """A model with an adaptation.

    Attributes:
        theirs: the eager model with it, by PEFT; None where PEFT has no such model.
        compiled: adaptc's.
    """

    theirs: Any
    compiled: adaptc.Compiled


def adapted(one: Model, kind: str, work: Path) -> Adapted:
    """A model that is adapted.

    Args:
        one: the model.
        kind: `base`, `LoRA`, `prefix` or `int4`.
        work: a folder for adapters.
    """
    if kind == "int4":
        scheme = {"method": "int4", "target": "all-linear", "block_size": 16}
        compiled = one.compile({"quantize": [scheme]})
        return Adapted(_dequantized(one.eager, compiled), compiled)
    if kind == "base":
        return Adapted(copy.deepcopy(one.eager), one.compile({}))
    theirs = _lora(one) if kind == "LoRA" else _prefix(one)
    if theirs is not None:
        theirs.save_pretrained(str(work / kind))
        return Adapted(theirs, one.compile({"adapt": [{"adapter": str(work / kind)}]}))
    compiled = one.compile({"adapt": [{"method": "prefix", "target": "*", "num_virtual_tokens": PREFIX}]})
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(4))
    return Adapted(None, compiled)


def _lora(one: Model) -> Any:
    if one.family is not None:
        return peft_model(copy.deepcopy(one.eager), one.family, "lora")
    targets = tuple(name for name, _ in one.eager.named_modules() if name.startswith(("packed.", "out.")))
    return peft_model(copy.deepcopy(one.eager), Family(None, None, targets, ()), "lora")


def _prefix(one: Model) -> Any:
    """The model with a prefix of PEFT's, drawn at random; None where PEFT has none for such a model."""
    from peft import PrefixTuningConfig, get_peft_model

    if one.family is None:
        return None
    assert one.family.task is not None
    torch.manual_seed(2)
    config = PrefixTuningConfig(task_type=TASKS[one.family.task], num_virtual_tokens=PREFIX)
    try:
        return get_peft_model(copy.deepcopy(one.eager), config).eval()
    except (AttributeError, ValueError):
        return None


def _dequantized(eager: Any, compiled: adaptc.Compiled) -> Any:
    """The eager model with the values that the few bits stand for."""
    eager = copy.deepcopy(eager)
    with torch.no_grad():
        for leaf in compiled.graph.quantized.values():
            weight = eager.get_submodule(leaf.site.module).weight
            value = leaf.quantization.dequantized()
            weight.copy_(value if value.shape == weight.shape else value.T)
    return eager
