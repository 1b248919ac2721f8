"""The longest text that a model's tables have places for is read from its graph, and told before a text is begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

import adaptc
from adaptc.ir.analysis.longest_text import longest_text
from adaptc.rewriter.cache.inputs import token_ids
from tests.decoders import BY_HAND, LONGEST
from tests.families import Zoo, marked
from tests.laws.test_cache import traced

FAMILIES = {
    "gpt2": "transformer.wpe.weight",
    "bart": "model.decoder.embed_positions.weight",
    "whisper": "model.decoder.embed_positions.weight",
    "llama": None,
    "t5": None,
    "mistral": None,
}


@pytest.mark.parametrize("name", marked(FAMILIES, ("gpt2", "llama")))
def test_families(zoo: Zoo, name: str) -> None:
    graph = zoo.graph(name)
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    limit = longest_text(graph.nodes, ids)
    if FAMILIES[name] is None:
        assert limit is None
        return
    assert limit is not None
    assert limit.table == FAMILIES[name]
    config = zoo.graph(name).source.pretrained.config  # type: ignore[union-attr]
    lengths = {"gpt2": "n_positions", "bart": "max_position_embeddings", "whisper": "max_target_positions"}
    assert limit.tokens == getattr(config, lengths[name])


@pytest.mark.parametrize("name", ["Decoder", "BufferMask"])
def test_decoders_written_by_hand(name: str) -> None:
    """A slice of a table, and a table that is looked up."""
    graph = traced(BY_HAND[name]())
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    limit = longest_text(graph.nodes, ids)
    assert limit is not None
    assert limit.tokens == LONGEST


class Counted(nn.Module):
    """Positions counted by `cumsum` from 1, two rows into the table: OPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(9, 4), nn.Embedding(12, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = (attention_mask.cumsum(1) * attention_mask - 1).long() + 2
        return self.embed(input_ids) + self.place(places)


def test_rows_in_front_of_the_first_token_are_no_places() -> None:
    dims = {"input_ids": "int64[batch, seq]", "attention_mask": "int64[batch, seq]"}
    graph = adaptc.compile({"inputs": dims}, model=Counted()).program.base
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    limit = longest_text(graph.nodes, ids)
    assert limit is not None
    assert limit.tokens == 10
    Counted()(torch.zeros(1, 10, dtype=torch.int64), torch.ones(1, 10, dtype=torch.int64))
    with pytest.raises(IndexError):
        Counted()(torch.zeros(1, 11, dtype=torch.int64), torch.ones(1, 11, dtype=torch.int64))


def test_generate_says_before_it_begins(zoo: Zoo) -> None:
    compiled = zoo.compiled("gpt2", [])
    limit = 64
    prompt = torch.randint(3, 90, (1, limit - 4))
    written = compiled.generate(prompt, 5, do_sample=False, eos_token_id=None)
    assert written.shape == (1, limit + 1)
    with pytest.raises(adaptc.AdaptcError) as caught:
        compiled.generate(prompt, 6, do_sample=False)
    assert str(caught.value) == (
        f"generate: {limit - 4} tokens and 6 new ones are more than the model can read: transformer.wpe.weight has "
        f"places for {limit}\n  pass max_new_tokens=5, or less"
    )
    with pytest.raises(adaptc.AdaptcError, match="shorten the prompt"):
        compiled.generate(torch.randint(3, 90, (1, limit + 2)), 1)
    assert compiled.generate(prompt, max_length=limit + 1, eos_token_id=None).shape == (1, limit + 1)


def test_a_command_stops_where_the_context_is_full(zoo: Zoo, tmp_path: Path) -> None:
    from adaptc.cli.generate_command import generate
    from adaptc.generation.settings import Settings
    from tests.served import save_tokenizer

    compiled = zoo.compiled("gpt2", [])
    compiled.emit("onnx", tmp_path / "model.onnx", cache=True)
    save_tokenizer(tmp_path / "words", None)
    (tmp_path / "words" / "generation_config.json").write_text('{"eos_token_id": 9999}')

    def ran(prompt: str) -> str:
        settings = Settings(500, temperature=0.0)
        words, path = str(tmp_path / "words"), tmp_path / "model.onnx"
        return generate(path, prompt, settings, False, (), words, lambda piece: None)["finished"]

    assert ran("<pad>" * 60) == "context"
    with pytest.raises(adaptc.AdaptcError, match="the prompt has 71 tokens, and the context 65"):
        ran("<pad>" * 70)
