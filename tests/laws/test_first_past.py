"""Virtual tokens behind a cache: what PEFT's generate writes, and what the graph without a cache writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adaptc.compiler.compiled import Compiled
from adaptc.ir.module import bind
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.first_past import Behind, WithoutVirtualTokens, first_past
from adaptc.rewriter.pipeline import run
from tests.chunked import chunked
from tests.families import DECODERS, VOCABULARY, Zoo, close, differs, entry, inputs, outputs, perturb

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3},
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
}
ENTRIES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "p-tuning": ("p-tuning",),
    "two prompts": ("prompt", "prompt"),
    "lora and prompt": ("lora", "prompt"),
    "prompt and prefix": ("prompt", "prefix"),
    "prefix and prompt": ("prefix", "prompt"),
}
CHUNKS = ((9,), (1,) * 9, (4, 1, 3, 1))


def compiled(zoo: Zoo, family: str, methods: tuple[str, ...], **spec: Any) -> Compiled:
    """A decoder with several methods, none of them the identity."""
    made = zoo.compiled(
        family, [{**entry(m, family), "name": f"n{i}"} for i, m in enumerate(methods)], **spec
    )
    perturb(made.module)
    return made


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of 7, 4 and 1 tokens, padded on the left, and their mask."""
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3], mask[2, :6] = 0, 0
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (3, 7), generator=generator), mask


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) == ("llama", "mlp") else pytest.mark.slow)
        for name in ("llama", "gpt2")
        for kind in KINDS
    ],
)
def test_as_peft_writes(zoo: Zoo, name: str, kind: str, tmp_path: Path) -> None:
    """Each row of a batch is what PEFT writes of it alone.

    PEFT counts the pads of a row as positions, so that a row of its batch is another text than the row alone. With
    positions that count pads the whole batch is PEFT's too.
    """
    make, options = KINDS[kind]
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(
        zoo.fresh(name), make(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    ).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = zoo.compiled(name, [{"adapter": str(tmp_path)}])
    ids, mask = padded()

    def both(rows: torch.Tensor, **given: Any) -> torch.Tensor:
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes no positions
            want = theirs.generate(
                input_ids=rows, **{k: v for k, v in given.items() if k != "position_ids"}, max_new_tokens=24
            )
        torch.manual_seed(3)
        got = ours.generate(rows, **given, max_new_tokens=24)
        assert torch.equal(got, want)
        return got

    positions = torch.arange(7).expand(3, 7)
    for way in WAYS.values():
        both(ids, attention_mask=mask, position_ids=positions, **{**GREEDY, **way})
    batch = ours.generate(ids, attention_mask=mask, max_new_tokens=24, **GREEDY)
    for row, text in enumerate(ids):
        alone = both(text[mask[row].bool()][None], **GREEDY)
        assert torch.equal(batch[row, 7:], alone[0, -24:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) == ("llama", "two prompts") else pytest.mark.slow)
        for name in DECODERS
        for kind in ENTRIES
    ],
)
def test_chunks_give_what_the_whole_gives(zoo: Zoo, name: str, kind: str) -> None:
    graph = compiled(zoo, name, ENTRIES[kind]).folded_graph()
    tensors = inputs(name, 3, 9)
    tensors["attention_mask"][1, :3] = 0
    tensors["attention_mask"][2, :5] = 0
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cached = run(graph, [WithoutVirtualTokens(), Cache(), Behind(first_past(graph))])
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)["logits"]
    seen = tensors["attention_mask"].bool()
    for chunks in CHUNKS:
        close(chunked(cached, tensors, "input_ids", chunks)[seen], want[seen])


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_generate_goes_on_from_training(zoo: Zoo, name: str) -> None:
    """The virtual tokens are read as they stand."""
    made = zoo.compiled(name, [entry("prompt", name), entry("lora", name)])
    ids, mask = padded()
    before = made.generate(ids, 8, attention_mask=mask, **GREEDY)
    perturb(made.module)
    after = made.generate(ids, 8, attention_mask=mask, **GREEDY)
    assert not torch.equal(before, after)
    whole = {"input_ids": after, "attention_mask": torch.cat([mask, torch.ones(3, 8, dtype=torch.int64)], 1)}
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = outputs(made.module.eval(), whole, made.graph.outputs)["logits"]
    assert torch.equal(logits[:, -9:-1].argmax(-1), after[:, -8:])


def test_every_one_of_two_prompts_is_read(zoo: Zoo) -> None:
    """The first in front, whatever is put in later."""
    made = compiled(zoo, "llama", ("prompt", "prompt"))
    tensors = inputs("llama", 2, 5)
    module = made.module.eval()
    prompts = dict(module.named_parameters())
    with torch.no_grad():
        before = outputs(module, tensors, made.graph.outputs)["logits"].clone()
        first, second = (prompts[f"prompt_embeddings.n{i}"] for i in range(2))
        both = torch.cat([first, second])
        second.copy_(second * 2)
        after = outputs(module, tensors, made.graph.outputs)["logits"].clone()
        differs(after, before)
        second.copy_(second / 2)
        first.copy_(first * 2)
        differs(outputs(module, tensors, made.graph.outputs)["logits"], before)
        one = zoo.compiled("llama", [{**entry("prompt", "llama"), "num_virtual_tokens": len(both)}])
        dict(one.module.named_parameters())["prompt_embeddings.default"].copy_(both)
        close(outputs(one.module.eval(), tensors, one.graph.outputs)["logits"], before)
