"""Texts written by a compiled decoder: a torch module with a cache, and transformers' ways of choosing tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn

from adaptc.compiler.buffers import Buffers
from adaptc.errors import AdaptcError, Refusal, RefusedError
from adaptc.ir.base import Base
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.optional import optional
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.inputs import new_tokens, token_ids
from adaptc.rewriter.cache.past import SEEN, TOTAL
from adaptc.rewriter.pipeline import run

NEW_TOKENS = 50
"""How many tokens are written, if nobody says."""


class Step(nn.Module):
    """A decoder's graph on new tokens, beside buffers that hold the keys and values of the past.

    Args:
        graph: without a cache; its weights are loaded.

    Raises:
        RefusedError: tokens meet outside attention, or no output is of words.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        cached = run(graph, [Cache(buffers=True)])
        ids = token_ids(cached)
        assert isinstance(ids, fx.Node)
        names = {node: spec.name for node, spec in zip(cached.placeholders, cached.inputs, strict=True)}
        self.ids, self.new, self.inputs = names[ids], new_tokens(cached), cached.inputs
        self.words = _words(cached)
        self.graph = bind(cached).eval()

    @property
    def buffers_of(self) -> list[Any]:
        """The inputs that are buffers."""
        return [spec for spec in self.inputs if spec.name.startswith("past_key_values.")]

    def forward(
        self, ids: torch.Tensor, past: Buffers, mask: torch.Tensor | None, more: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The logits `(batch, new, words)` of new tokens `(batch, new)`, whose keys and values are added to the past.

        Args:
            ids: the new tokens.
            past: the buffers.
            mask: `(batch, past + new)`, 0 at tokens that are not seen; None where all are.
            more: the other inputs of the graph, of the new tokens.

        Raises:
            AdaptcError: an input is missing.
        """
        batch, count = ids.shape
        past.reserve(batch, count, ids.device)
        seen = torch.empty(1, dtype=torch.bool, device=ids.device).expand(past.length)
        given = {self.ids: ids, SEEN: seen, **more}
        given |= {spec.name: tensor for spec, tensor in zip(self.buffers_of, past.tensors, strict=True)}
        values = [
            self._mask(spec, mask, past, ids) if _is_mask(spec) else given.get(spec.name)
            for spec in self.inputs
        ]
        missing = [spec.name for spec, value in zip(self.inputs, values, strict=True) if value is None]
        if missing:
            raise AdaptcError(
                f"generate: the model takes {', '.join(missing)} too",
                f"pass it: generate(ids, {missing[0]}=...)",
            )
        outputs = self.graph(*values)
        past.length += count
        return outputs[self.words]

    def _mask(self, spec: Any, mask: torch.Tensor | None, past: Buffers, ids: torch.Tensor) -> torch.Tensor:
        """A mask as long as the buffers; tokens behind the new ones are hidden by the graph itself."""
        whole = torch.ones(len(ids), past.room, dtype=getattr(torch, spec.dtype), device=ids.device)
        if mask is not None:
            whole[:, : mask.shape[1]] = mask
        return whole


def _is_mask(spec: Any) -> bool:
    return spec.dims[1:] == (TOTAL,)


def _words(graph: Graph) -> int:
    """The position of the output of logits: `logits`, or the first `(batch, tokens, words)`.

    Raises:
        RefusedError: there is none.
    """
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    if "logits" in graph.outputs:
        return graph.outputs.index("logits")
    for position, node in enumerate(results):
        if node.meta["val"].dim() == 3:
            return position
    names = ", ".join(graph.outputs)
    raise RefusedError(
        [Refusal(f"no output is of the shape (batch, tokens, words) to write a text by: {names}")]
    )


@cache
def _decoder_class() -> type[nn.Module]:
    """The class of a module that writes texts by `GenerationMixin`; it needs transformers."""
    transformers: Any = optional("transformers")
    outputs: Any = optional("transformers.modeling_outputs")
    model_class: Any = transformers.PreTrainedModel
    mixin_class: Any = transformers.GenerationMixin

    class Decoder(model_class, mixin_class):  # type: ignore[misc]
        """A graph with a cache, as a model of transformers."""

        main_input_name = "input_ids"
        config_class = transformers.PreTrainedConfig

        def __init__(self, step: Step, config: Any, generation_config: Any) -> None:
            model_class.__init__(self, config)
            self.step, self.generation_config = step, generation_config

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Buffers | None = None,
            **more: Any,
        ) -> Any:
            """The logits of new tokens."""
            past = past_key_values or Buffers(self.step.buffers_of, input_ids.shape[1])
            tensors = {name: value for name, value in more.items() if isinstance(value, torch.Tensor)}
            if position_ids is not None:
                tensors["position_ids"] = position_ids.expand(len(input_ids), -1)
            logits = self.step(input_ids, past, attention_mask, tensors)
            return outputs.CausalLMOutputWithPast(logits=logits, past_key_values=past)

    return Decoder


class Generator:
    """Writes texts by a graph without a cache, which is given one.

    Attributes:
        step: the module that computes the logits of new tokens; `step.graph.compile()` lets torch compile it.

    Args:
        graph: a decoder.
        source: where it comes from: what transformers is told of it.
    """

    def __init__(self, graph: Graph, source: Base):
        self.step = Step(graph)
        transformers: Any = optional("transformers")
        config, defaults = _configuration(source, transformers)
        self._decoder: Any = cast(Any, _decoder_class())(self.step, config, defaults)

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int | None, **options: Any) -> Any:
        """What transformers' `generate` gives for a prompt `(batch, tokens)`."""
        if "max_length" not in options:
            options["max_new_tokens"] = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        room = max(options.get("max_length", 0), input_ids.shape[1] + options.get("max_new_tokens", 0))
        if options.get("use_cache", True):
            options["past_key_values"] = Buffers(self.step.buffers_of, room)
        with torch.no_grad():
            return self._decoder.generate(input_ids, **options)


def _configuration(source: Base, transformers: Any) -> tuple[Any, Any]:
    """The configuration of a base and its defaults for writing; empty ones where it is not from transformers."""
    origin, model = source.pretrained, source.model
    if origin is not None:
        try:
            return origin.config, transformers.GenerationConfig.from_pretrained(origin.transformer)
        except OSError:  # the directory has no file of defaults
            return origin.config, transformers.GenerationConfig.from_model_config(origin.config)
    if isinstance(model, transformers.PreTrainedModel):
        written: Any = model
        return written.config, written.generation_config
    return transformers.PreTrainedConfig(), transformers.GenerationConfig()
