"""Texts written by a compiled decoder: a torch module with a cache, and transformers' ways of choosing tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn

from adaptc.compiler.buffers import Buffers
from adaptc.errors import AdaptcError, Refusal, RefusedError
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.longest_text import LongestText, longest_text
from adaptc.ir.base import Base
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.optional import optional
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder, Encoder, crossed
from adaptc.rewriter.cache.first_past import FirstPast, WithoutVirtualTokens, one_token, virtual_tokens
from adaptc.rewriter.cache.inputs import token_ids
from adaptc.rewriter.cache.past import SEEN, TOTAL
from adaptc.rewriter.cache.signature import PAST_PREFIX, dtype, past_of
from adaptc.rewriter.pipeline import run

NEW_TOKENS = 50
"""How many tokens are written, if nobody says."""


class EncoderStep(nn.Module):
    """The encoder of an encoder-decoder: what its decoder reads of it, by the names of the decoder's inputs.

    Args:
        graph: the encoder and the decoder; weights are loaded.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        encoder = run(graph, [Encoder()])
        self.inputs, self.gives = encoder.inputs, [past_of(name) for name in encoder.outputs]
        self.main_input_name = self.inputs[0].name
        self.graph = bind(encoder).eval()

    def forward(self, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The keys and values for the decoder.

        Raises:
            AdaptcError: an input is missing.
        """
        main = kwargs[self.main_input_name]
        given = {spec.name: kwargs.get(spec.name) for spec in self.inputs}
        for spec in self.inputs:
            if given[spec.name] is None and "mask" in spec.name:
                given[spec.name] = torch.ones(main.shape[:2], dtype=dtype(spec), device=main.device)
        _check_given(given)
        return dict(zip(self.gives, self.graph(*given.values()), strict=True))


class FirstStep(nn.Module):
    """The keys and values of the virtual tokens in front of every text, by the names of the decoder's inputs.

    Args:
        graph: a graph with virtual tokens; weights are loaded.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        part = run(graph, [FirstPast()])
        self.inputs, self.gives = part.inputs, part.outputs
        self.graph = bind(part).eval()

    def forward(self) -> dict[str, torch.Tensor]:
        """The keys and values, `(1, heads, virtual, size)`."""
        device = next((tensor.device for tensor in self.graph.parameters()), None)
        given = [value.to(device) for value in one_token(self.inputs).values()]
        return dict(zip(self.gives, self.graph(*given), strict=True))


class Step(nn.Module):
    """A decoder's graph on new tokens, beside buffers that hold the keys and values of the past.

    Args:
        graph: without a cache; its weights are loaded. What is computed of an encoder is an input.

    Raises:
        RefusedError: tokens meet outside attention, or no output is of words.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        self.first = FirstStep(graph) if virtual_tokens(graph) else None
        cached = run(graph, [WithoutVirtualTokens(), Decoder(), Cache(buffers=True)])
        ids = token_ids(cached)
        assert isinstance(ids, fx.Node)
        names = {node: spec.name for node, spec in zip(cached.placeholders, cached.inputs, strict=True)}
        self.ids, self.inputs = names[ids], cached.inputs
        self.words = _logits(cached)
        self.graph = bind(cached).eval()

    def empty(self, room: int) -> Buffers:
        """The past of a text without tokens, with room for so many."""
        return Buffers(self.buffers_of, room, None if self.first is None else self.first())

    @property
    def buffers_of(self) -> list[InputSpec]:
        """The inputs that are buffers."""
        return [spec for spec in self.inputs if spec.name.startswith(PAST_PREFIX) and TOTAL in spec.dims]

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
        if past.virtual and "position_ids" in given:
            given["position_ids"] = given["position_ids"] + past.virtual
        given |= {spec.name: tensor for spec, tensor in zip(self.buffers_of, past.tensors, strict=True)}
        for spec in self.inputs:
            if spec.dims[1:] == (TOTAL,):
                given[spec.name] = _mask(spec, mask, past, ids)
        _check_given({spec.name: given.get(spec.name) for spec in self.inputs})
        outputs = self.graph(*(given[spec.name] for spec in self.inputs))
        past.length += count
        return outputs[self.words]


def _mask(spec: InputSpec, mask: torch.Tensor | None, past: Buffers, ids: torch.Tensor) -> torch.Tensor:
    """A mask as long as the buffers; the graph itself hides what is behind the new tokens."""
    whole = torch.ones(len(ids), past.room, dtype=dtype(spec), device=ids.device)
    if mask is not None:
        whole[:, past.virtual : past.virtual + mask.shape[1]] = mask
    return whole


def _check_given(inputs: Mapping[str, torch.Tensor | None]) -> None:
    """Check that every input is given.

    Raises:
        AdaptcError: one is missing.
    """
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        names = ", ".join(missing)
        raise AdaptcError(
            f"generate: the model takes {names} too", f"pass it: generate(ids, {missing[0]}=...)"
        )


def _logits(graph: Graph) -> int:
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
def name_of_cache() -> str:
    """What the installed transformers calls keys and values: `past_key_values`, and from 5.24 on `cache`."""
    outputs: Any = optional("transformers.modeling_outputs")
    fields = outputs.Seq2SeqLMOutput.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"


def _writer_class() -> type[nn.Module]:
    """The class of a module that writes texts by `GenerationMixin`; it needs transformers."""
    transformers: Any = optional("transformers")
    outputs: Any = optional("transformers.modeling_outputs")
    model_class: Any = transformers.PreTrainedModel
    mixin_class: Any = transformers.GenerationMixin

    class Writer(model_class, mixin_class):  # type: ignore[misc]
        """A graph with a cache, as a model of transformers."""

        config_class = transformers.PreTrainedConfig

        def __init__(self, step: Step, encoder: EncoderStep | None, config: Any, defaults: Any) -> None:
            model_class.__init__(self, config)
            self.step, self.encode, self.generation_config = step, encoder, defaults
            self.main_input_name = "input_ids" if encoder is None else encoder.main_input_name

        def get_encoder(self, modality: str | None = None) -> EncoderStep | None:
            """What transformers runs once for each text."""
            return self.encode

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Buffers | None = None,
            cache: Buffers | None = None,
            decoder_input_ids: torch.Tensor | None = None,
            decoder_attention_mask: torch.Tensor | None = None,
            encoder_outputs: Mapping[str, torch.Tensor] | None = None,
            **more: Any,
        ) -> Any:
            """The logits of new tokens."""
            ids = input_ids if decoder_input_ids is None else decoder_input_ids
            assert ids is not None
            held = cache or past_key_values
            past = held or self.step.empty(ids.shape[1])
            tensors = {name: value for name, value in more.items() if isinstance(value, torch.Tensor)}
            if position_ids is not None:
                tensors["position_ids"] = position_ids.expand(len(ids), -1)
            mask = attention_mask
            if encoder_outputs is not None:
                mask, length = decoder_attention_mask, next(iter(encoder_outputs.values())).shape[-2]
                ones = torch.ones(len(ids), length, dtype=torch.int64, device=ids.device)
                tensors |= {
                    **encoder_outputs,
                    "attention_mask": ones if attention_mask is None else attention_mask,
                }
            logits = self.step(ids, past, mask, tensors)
            return outputs.Seq2SeqLMOutput(logits=logits, **{name_of_cache(): held})

    return Writer


class Generator:
    """Writes texts by a graph without a cache, which is given one.

    Attributes:
        step: the module that computes the logits of new tokens; `step.graph.compile()` lets torch compile it.

    Args:
        graph: a decoder, or an encoder and a decoder.
        source: where it comes from: what transformers is told of it.
    """

    def __init__(self, graph: Graph, source: Base):
        self.step, ids = Step(graph), token_ids(graph)
        assert isinstance(ids, fx.Node)  # the step has told otherwise
        self._longest = longest_text(graph.nodes, ids)
        encoder = EncoderStep(graph) if crossed(graph) else None
        transformers: Any = optional("transformers")
        config, defaults = (copy.deepcopy(item) for item in _configuration(source, transformers))
        config._attn_implementation = "eager"  # transformers computes no attention here
        self._writer: Any = cast(Any, _writer_class())(self.step, encoder, config, defaults)

    def generate(self, inputs: torch.Tensor, max_new_tokens: int | None, **options: Any) -> Any:
        """What transformers' `generate` gives for a prompt `(batch, tokens)`, or for the inputs of an encoder.

        Raises:
            AdaptcError: the text could become longer than the model can read.
        """
        if "max_length" not in options:
            options["max_new_tokens"] = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        prompt = inputs.shape[1]
        if self._writer.encode is not None:  # a text begins with a token of its own
            prompt = 1 + (options["decoder_input_ids"].shape[1] if "decoder_input_ids" in options else 0)
        room = max(options.get("max_length", 0), prompt + options.get("max_new_tokens", 0))
        if self._longest is not None:
            _check_length(prompt, room, self._longest)
        if options.setdefault("use_cache", True):  # whatever the configuration says: training switches it off
            with torch.no_grad():
                options[name_of_cache()] = self.step.empty(room)
        with torch.no_grad():
            return self._writer.generate(inputs, **options)


def _check_length(prompt: int, room: int, longest: LongestText) -> None:
    """Check that a text does not outgrow a table; its last token is written, and not read.

    Args:
        prompt: the tokens of the prompt.
        room: the most tokens that it can have with its answer.
        longest: what the model can read.

    Raises:
        AdaptcError: it could.
    """
    new = longest.tokens + 1 - prompt
    if room - prompt > new:
        advice = f"pass max_new_tokens={new}, or less" if new > 0 else "shorten the prompt"
        raise AdaptcError(
            f"generate: {prompt} tokens and {room - prompt} new ones are more than the model can read: "
            f"{longest.table} has places for {longest.tokens}",
            advice,
        )


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
