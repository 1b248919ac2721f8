"""A SentenceTransformer as one model: the transformer, whose `forward` goes on through the modules after it.

The modules become children of the transformer. So its layers keep their own names, which PEFT's keys and targets use.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptc.checkpoints.sentence_transformer import (
    MODULES,
    SentenceTransformerFiles,
    module_folders,
    read_sentence_transformer,
)
from adaptc.errors import TraceError, WeightError
from adaptc.inputs import InputSpec
from adaptc.optional import optional
from adaptc.tracing.sentence_modules import MASK, PROMPT, SENTENCE, TOKENS, Pooling, build
from adaptc.weights import Stored

PROMPT_INPUT = InputSpec(PROMPT, "int64", (), high=2)
"""The input that a pooling which leaves prompts out takes beside the tokens; 0 for no prompt."""


class SentenceEmbedding:
    """Makes the model of a SentenceTransformer directory; it is called as transformers' Auto classes are."""

    def __init__(self, directory: Path):
        self.files = read_sentence_transformer(directory)

    def from_config(self, config: object, **options: Any) -> nn.Module:
        """The model without its weights.

        Raises:
            TraceError: a module cannot be built, or there is no encoder alone of an encoder-decoder.
        """
        return _join(_auto(config).from_config(config, **options), self.files)

    def from_pretrained(
        self, name: str, *, config: object, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model with its weights, and what transformers reports of the transformer's keys.

        Raises:
            WeightError: the weights of a module after the transformer are not those of its file.
        """
        stored = SentenceEmbedding(Path(name))
        model, report = _auto(config).from_pretrained(stored.files.model, config=config, **options)
        _join(model, stored.files)
        with torch.no_grad():
            for key, weight in stored.weights(model).items():
                model.get_parameter(key).copy_(weight.load())
        return model, report

    def weights(self, model: nn.Module) -> dict[str, Stored]:
        """The weights of the modules after the transformer, by their names in the model; no data is read.

        Raises:
            WeightError: one is missing, has another shape than its module, or has no place there.
        """
        stored = self.files.tensors()
        expected = {name: p for name, p in model.named_parameters() if name.startswith(self._prefixes)}
        for name in [*expected, *stored]:
            if name not in stored:
                raise WeightError(f"{self.files.directory}: {name} is in no file of its module")
            if name not in expected:
                raise WeightError(f"{stored[name].file}: {stored[name].key} has no place in its module")
            if stored[name].shape != tuple(expected[name].shape):
                raise WeightError(
                    f"{stored[name].file}: tensor {stored[name].key!r} has shape {list(stored[name].shape)}, "
                    f"but config.json describes {list(expected[name].shape)}"
                )
        return {name: replace(weight, dtype=expected[name].dtype) for name, weight in stored.items()}

    def heads(self, model: nn.Module) -> frozenset[str]:
        """The layers that are no layers of the transformer, which `all-linear` leaves out, as PEFT does."""
        modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
        return frozenset(name for name, _ in modules if name.startswith(self._prefixes))

    def inputs(self, model: nn.Module) -> tuple[InputSpec, ...]:
        """The inputs of the model beside those of its transformer."""
        return (PROMPT_INPUT,) if _takes_prompt(model) else ()

    @property
    def folders(self) -> dict[str, str]:
        """The name of a part of the model -> the folder of its files, see `Pretrained`."""
        others = {module.name: module.path for module in self.files.others}
        return {"": self.files.transformer.path, **others}

    @property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{module.name}." for module in self.files.others)


def left_out_notes(directory: Path) -> list[str]:
    """The note on the modules that a SentenceTransformer directory has beside the transformer that is compiled."""
    kinds = [Path(folder).name for folder in module_folders(directory) if folder]
    return (
        [f"{MODULES} lists {', '.join(kinds)} too: task: sentence-embedding compiles them along"]
        if kinds
        else []
    )


def _auto(config: Any) -> Any:
    """transformers' Auto class for the transformer; of an encoder-decoder, sentence-transformers takes the encoder.

    Raises:
        TraceError: transformers has no encoder alone of this model.
    """
    transformers = optional("transformers")
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise TraceError(f"a sentence embedding needs an encoder, and {config.model_type} has none alone")
    return transformers.AutoModel


def _join(transformer: nn.Module, files: SentenceTransformerFiles) -> nn.Module:
    """Make the modules children of the transformer, and its `forward` one that goes on through them.

    Raises:
        TraceError: a module cannot be built, or reads what none before it gives.
    """
    features = {TOKENS}
    for folder in files.others:
        module = build(folder)
        if module.reads not in features:
            given = ", ".join(sorted(features))
            raise TraceError(f"{folder.name} needs {module.reads}, and the modules before it give {given}")
        features.add(module.writes)
        transformer.add_module(folder.name, module.to(next(transformer.parameters()).dtype))
    if SENTENCE not in features:
        raise TraceError(f"{files.directory / MODULES}: no module gives a {SENTENCE}; expected a Pooling")
    kind = type(transformer)
    forward = _forward(kind, [folder.name for folder in files.others], _takes_prompt(transformer))
    transformer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return transformer


def _takes_prompt(model: nn.Module) -> bool:
    return any(isinstance(child, Pooling) and not child.include_prompt for child in model.children())


def _forward(kind: type[nn.Module], names: list[str], prompt: bool) -> Any:
    """The `forward` of a transformer of this class that goes on through its children of these names."""
    signature = inspect.signature(kind.forward)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {PROMPT: inputs.pop(PROMPT)} if PROMPT in inputs else {}
        given = signature.bind(self, *args, **inputs).arguments
        features[TOKENS] = kind.forward(self, *args, **inputs, return_dict=True).last_hidden_state
        if given.get(MASK) is not None:
            features[MASK] = given[MASK]
        for name in names:
            features = self.get_submodule(name)(features)
        return {SENTENCE: features[SENTENCE]}

    if prompt:
        extra = inspect.Parameter(PROMPT, inspect.Parameter.KEYWORD_ONLY)
        parameters = sorted([*signature.parameters.values(), extra], key=lambda parameter: parameter.kind)
        vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    return forward
