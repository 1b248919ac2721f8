"""`generate` with a cache writes what the model writes without one, and what transformers writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import GenerationMixin

import adaptc
from adaptc.compiler.compiled import Compiled
from tests.decoders import BY_HAND, MIXES_TOKENS, WORDS
from tests.families import DECODERS, VOCABULARY, Zoo, entry, inputs, marked, outputs, perturb, randomise

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3},
}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 1 tokens, padded on the left, and their mask."""
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3], mask[2, :6] = 0, 0
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (3, 7), generator=generator), mask


@pytest.mark.parametrize("name", marked(DECODERS, ("gpt2",)))
def test_as_transformers_writes(zoo: Zoo, name: str) -> None:
    model: Any = zoo.eager(name)
    compiled = zoo.compiled(name, [])
    ids, mask = prompts()
    for options in WAYS.values():
        both = {**GREEDY, "attention_mask": mask, "max_new_tokens": 24, **options}
        torch.manual_seed(3)
        want = model.generate(ids, **both)
        torch.manual_seed(3)
        assert torch.equal(compiled.generate(ids, **both), want)
    one = ids[:1, :1]
    want = model.generate(one, max_new_tokens=12, **GREEDY)
    assert torch.equal(compiled.generate(one, 12, **GREEDY), want)


@pytest.mark.slow
def test_a_model_handed_in_whose_configuration_has_no_cache(zoo: Zoo) -> None:
    """As after training, which switches the cache off."""
    model: Any = zoo.fresh("llama")
    model.config.use_cache = model.generation_config.use_cache = False
    ids, mask = prompts()
    options: dict[str, Any] = {**GREEDY, "attention_mask": mask, "max_new_tokens": 10}
    want = model.generate(ids, **options)
    compiled = adaptc.compile({}, model=model)
    assert torch.equal(compiled.generate(ids, **options), want)
    assert torch.equal(compiled.generate(ids, **options, use_cache=False), want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_adapted_encoder_decoder_writes_as_without_a_cache(zoo: Zoo, name: str, method: str) -> None:
    compiled = zoo.compiled(name, [entry(method, name)])
    perturb(compiled.module)
    tensors = inputs(name, 3, 7, pad=True)
    main, mask = tensors["input_ids"], tensors["attention_mask"]
    ends = {"forced_eos_token_id": None}  # BART's settings end every text with one
    got = compiled.generate(main, 14, attention_mask=mask, decoder_start_token_id=2, **ends, **GREEDY)
    want, module = torch.full((3, 1), 2), compiled.module.eval()
    for _ in range(14):
        with torch.no_grad():
            logits = module(input_ids=main, attention_mask=mask, decoder_input_ids=want)["logits"]
        want = torch.cat([want, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_as_transformers_writes(zoo: Zoo, name: str) -> None:
    model: Any = zoo.eager(name)
    compiled = zoo.compiled(name, [])
    tensors = inputs(name, 3, 7, pad=True)
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": 14, "decoder_start_token_id": 2}
    if name == "whisper":
        options["decoder_input_ids"] = torch.tensor([[2, 5]] * 3)
        main = tensors["input_features"]
    else:
        options["attention_mask"] = tensors["attention_mask"]
        main = tensors["input_ids"]
    for more in WAYS.values():
        torch.manual_seed(3)
        want = GenerationMixin.generate(model, main, **{**options, **more})
        torch.manual_seed(3)
        assert torch.equal(compiled.generate(main, **{**options, **more}), want)


def without_cache(compiled: Compiled, ids: torch.Tensor, count: int, name: str = "input_ids") -> torch.Tensor:
    """The tokens that greedy search adds, each from all tokens before it."""
    module = compiled.module.eval()
    for _ in range(count):
        with torch.no_grad():
            result = module(**{name: ids})
        logits = result["logits"] if isinstance(result, dict) else result
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", marked(BY_HAND, ("Alibi", "OtherName")))
def test_a_decoder_written_by_hand(name: str) -> None:
    ids = "tokens" if name == "OtherName" else "input_ids"
    spec = {"inputs": {ids: "int64[batch, seq]"}}
    compiled = adaptc.compile(spec, model=randomise(BY_HAND[name]()).eval())
    prompt = torch.randint(0, WORDS, (2, 5))
    want = without_cache(compiled, prompt, 12, ids)
    assert torch.equal(compiled.generate(prompt, 12, **GREEDY), want)


@pytest.mark.parametrize("method", marked(["lora", "prefix", "bottleneck"], ["prefix"]))
def test_adapters_are_read_as_they_stand(zoo: Zoo, method: str) -> None:
    compiled = zoo.compiled("llama", [entry(method, "llama")])
    ids, mask = prompts()
    before = compiled.generate(ids, 8, attention_mask=mask, **GREEDY)
    perturb(compiled.module)
    after = compiled.generate(ids, 8, attention_mask=mask, **GREEDY)
    assert not torch.equal(before, after)
    whole = {"input_ids": after, "attention_mask": torch.cat([mask, torch.ones(3, 8, dtype=torch.int64)], 1)}
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = outputs(compiled.module.eval(), whole, compiled.graph.outputs)["logits"]
    assert torch.equal(logits[:, -9:-1].argmax(-1), after[:, -8:])


def test_a_compiled_module_is_not_compiled_again_at_each_step(zoo: Zoo) -> None:
    compiled = zoo.compiled("llama", [])
    ids, _ = prompts()
    want = compiled.generate(ids, 20, **GREEDY)
    counter, step = CompileCounter(), compiled.program.generator().step
    step.graph.compile(backend=counter, dynamic=True)
    compiled.generate(ids, 4, **GREEDY)
    few = counter.frame_count
    assert torch.equal(compiled.generate(ids, 20, **GREEDY), want)
    assert counter.frame_count - few <= 1


@pytest.mark.parametrize("name", ["bidirectional", "mean"])
def test_what_can_have_no_cache_is_refused(name: str) -> None:
    make, says = MIXES_TOKENS[name]
    compiled = adaptc.compile({"inputs": {"input_ids": "int64[batch, seq]"}}, model=randomise(make()).eval())
    with pytest.raises(adaptc.AdaptcError, match=says):
        compiled.generate(torch.zeros(1, 3, dtype=torch.int64))
