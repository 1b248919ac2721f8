"""What a layer does is read from the dataflow, on models with names and on models without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.plan.plan import Plan, make_plan
from adaptc.errors import SpecError
from adaptc.ir.graph import Graph
from adaptc.methods.site import MATRIX_KINDS
from adaptc.spec.spec import load
from tests.families import Zoo, randomise

WIDTH, HEADS, WORDS = 16, 4, 24
Q, K, V, O = (f"attention.{part}" for part in ("query", "key", "value", "output"))  # noqa: E741
IN, GATE, OUT = (f"feed_forward.{part}" for part in ("in", "gate", "out"))

DECODER = {
    "*.q_proj": {Q}, "*.k_proj": {K}, "*.v_proj": {V}, "*.o_proj": {O},
    "*.gate_proj": {GATE}, "*.up_proj": {IN}, "*.down_proj": {OUT},
    "lm_head": {"head"}, "*embed_tokens": {"embedding"},
}  # fmt: skip
ENCODER_DECODER = {
    "*.q_proj": {Q}, "*.k_proj": {K}, "*.v_proj": {V}, "*.out_proj": {O}, "*.fc1": {IN}, "*.fc2": {OUT},
}  # fmt: skip
FUSED_HEADS = {
    "*.query_key_value": {Q, K, V}, "*.dense": {O}, "*.dense_h_to_4h": {IN}, "*.dense_4h_to_h": {OUT},
    "lm_head": {"head"}, "*embed*": {"embedding"},
}  # fmt: skip
TABLES: dict[str, Mapping[str, set[str]]] = {
    "llama": DECODER,
    "qwen3": DECODER,
    "mistral": DECODER,
    "gemma2": DECODER,
    "gpt2": {
        "*.c_attn": {Q, K, V}, "*.attn.c_proj": {O}, "*.c_fc": {IN}, "*.mlp.c_proj": {OUT},
        "lm_head": {"head"}, "*.wte": {"embedding"}, "*.wpe": {"embedding"},
    },
    "bert": {
        "*.query": {Q}, "*.key": {K}, "*.value": {V}, "*.attention.output.dense": {O},
        "*.intermediate.dense": {IN}, "*.layer.*.output.dense": {OUT}, "classifier": {"head"},
        "*.pooler.dense": set(), "*embeddings*": {"embedding"},
    },
    "t5": {
        "*.q": {Q}, "*.k": {K}, "*.v": {V}, "*.o": {O}, "*.wi": {IN}, "*.wo": {OUT},
        "lm_head": {"head"}, "*embed_tokens": {"embedding"}, "*.relative_attention_bias": {"embedding"},
    },
    "mixtral": {
        "*.q_proj": {Q}, "*.k_proj": {K}, "*.v_proj": {V}, "*.o_proj": {O},
        "*.experts.gate_up_proj": {GATE, IN}, "*.experts.down_proj": {OUT}, "*.mlp.gate": set(),
        "lm_head": {"head"}, "*embed_tokens": {"embedding"},
    },
    "bart": {**ENCODER_DECODER, "lm_head": {"head"}, "*embed*": {"embedding"}},
    "whisper": {
        **ENCODER_DECODER, "proj_out": {"head"}, "*.embed_tokens": {"embedding"},
        "*encoder.embed_positions": {"embedding"}, "*.conv1": {IN}, "*.conv2": {OUT},
    },
    "vit": {
        **ENCODER_DECODER, "*.o_proj": {O}, "*.dense": {O}, "classifier": {"head"}, "*projection": set(),
    },
    "block": {
        "query": {Q}, "key": {K}, "value": {V}, "out": {O}, "wide": {IN}, "narrow": {OUT},
    },
}  # fmt: skip
EXTRA: dict[str, tuple[str, dict[str, Any], Mapping[str, set[str]]]] = {
    "phi3": (
        "Phi3",
        {"num_key_value_heads": 2},
        {**DECODER, "*.qkv_proj": {Q, K, V}, "*.gate_up_proj": {GATE, IN}},
    ),
    "gpt-neox": ("GPTNeoX", {}, FUSED_HEADS),
    "bloom": ("Bloom", {"n_layer": 1, "n_head": HEADS}, FUSED_HEADS),
}
TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip


def roles_of(graph: Graph) -> dict[str, set[str]]:
    return {site.pattern: graph.roles.of[site.uses[0]] for site in graph.sites if site.kind in MATRIX_KINDS}


def rows_of(graph: Graph, name: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Of a fused weight, the rows that play each role."""
    site = next(site for site in graph.sites if fnmatchcase(site.pattern, name) and site.kind in MATRIX_KINDS)
    return {role: rows for (use, role), rows in graph.roles.rows.items() if use == site.uses[0]}


def check(graph: Graph, table: Mapping[str, set[str]]) -> None:
    for name, found in roles_of(graph).items():
        pattern = max((p for p in table if fnmatchcase(name, p)), key=len)
        assert found == table[pattern], name


def heads(part: int, count: int = HEADS, size: int = 8, parts: int = 3) -> tuple[tuple[int, int], ...]:
    """The rows of one part where each head has its query, key and value beside one another."""
    return tuple((start, start + size) for start in range(part * size, count * parts * size, parts * size))


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("llama", "gpt2", "bert", "block") else pytest.param(n, marks=pytest.mark.slow)
        for n in TABLES
    ],
)
def test_roles_of_families(zoo: Zoo, name: str) -> None:
    check(zoo.graph(name), TABLES[name])


def test_rows_of_a_fused_projection(zoo: Zoo) -> None:
    want = {Q: ((0, 32),), K: ((32, 64),), V: ((64, 96),)}
    assert rows_of(zoo.graph("gpt2"), "*.1.attn.c_attn") == want


@pytest.mark.slow
def test_rows_of_fused_experts(zoo: Zoo) -> None:
    assert rows_of(zoo.graph("mixtral"), "*.0.*.gate_up_proj") == {GATE: ((0, 48),), IN: ((48, 96),)}


def traced(model: nn.Module, **inputs: torch.Tensor) -> Graph:
    axes = {0: "batch", 1: "seq"}
    return adaptc.trace(randomise(model).eval(), inputs, dict.fromkeys(inputs, axes))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRA)
def test_roles_of_fused_families(name: str) -> None:
    import transformers

    kind, options, table = EXTRA[name]
    config = getattr(transformers, f"{kind}Config")(**TEXT | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    graph = traced(model, input_ids=torch.randint(0, WORDS, (2, 5)))
    check(graph, table)
    if name == "phi3":
        assert rows_of(graph, "*.qkv_proj") == {Q: ((0, 32),), K: ((32, 48),), V: ((48, 64),)}
        assert rows_of(graph, "*.gate_up_proj") == {GATE: ((0, 48),), IN: ((48, 96),)}
    else:
        assert rows_of(graph, "*.query_key_value") == {Q: heads(0), K: heads(1), V: heads(2)}


@pytest.mark.slow
def test_roles_of_a_gated_t5() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=WORDS, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=HEADS, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, WORDS, (2, 5))
    graph = traced(
        transformers.T5ForConditionalGeneration(config), input_ids=ids, decoder_input_ids=ids[:, :3]
    )
    check(graph, {**TABLES["t5"], "*.wi_0": {GATE}, "*.wi_1": {IN}})


class Nameless(nn.Module):
    """A transformer whose names say nothing. Query, key and value are in `b`, head by head; `e` is gated by `d`."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 24, bias=False)
        self.e, self.f = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH)
        self.g, self.h = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        q, k, v = self.b(self.g(x)).unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        x = x + self.c(self.attend(q, k, v).flatten(2))
        x = x + self.f(F.silu(self.d(x)) * self.e(x))
        return self.h(self.g(x))


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def by_matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) / 2
    return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2)


def by_bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, length = q.shape[:2]
    q, k, v = (t.transpose(1, 2).reshape(batch * HEADS, length, -1) for t in (q, k, v))
    mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return mixed.reshape(batch, HEADS, length, -1).transpose(1, 2)


def by_one_operation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


SPELLINGS = {f.__name__: f for f in (by_einsum, by_matmul, by_bmm, by_one_operation)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_model_whose_names_say_nothing(spelling: str) -> None:
    graph = traced(Nameless(SPELLINGS[spelling]), x=torch.randint(0, WORDS, (3, 5)))
    assert roles_of(graph) == {
        "a": {"embedding"}, "b": {Q, K, V}, "c": {O}, "d": {GATE}, "e": {IN}, "f": {OUT}, "h": {"head"},
    }  # fmt: skip
    assert rows_of(graph, "b") == {Q: heads(0, size=4), K: heads(1, size=4), V: heads(2, size=4)}


class Raw(nn.Module):
    """Attention and feed-forward on parameters: `x @ W`, one of them with two axes of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(WIDTH, HEADS, 4))
        self.q, self.r, self.s = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in "qrs")
        self.t, self.u = nn.Parameter(torch.empty(WIDTH, 48)), nn.Parameter(torch.empty(24, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.einsum("bsi,ihd->bshd", x, self.p)
        k, v = (torch.matmul(x, W).unflatten(-1, (HEADS, 4)) for W in (self.q, self.r))
        x = x + by_matmul(q, k, v).flatten(2) @ self.s
        gate, up = (x @ self.t).chunk(2, -1)
        return x + (F.gelu(gate) * up) @ self.u


class Module(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.m(x)


def test_parameters_without_a_layer() -> None:
    graph = traced(Module(Raw()), x=torch.randn(3, 5, WIDTH))
    assert roles_of(graph) == {
        "m.p": {Q}, "m.q": {K}, "m.r": {V}, "m.s": {O}, "m.t": {GATE, IN}, "m.u": {OUT},
    }  # fmt: skip
    assert rows_of(graph, "m.p") == {}
    assert rows_of(graph, "m.t") == {GATE: ((0, 24),), IN: ((24, 48),)}


class Convolved(nn.Module):
    """Attention over the places of an image, of 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(4, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, 3 * WIDTH, 1),
            nn.Conv2d(WIDTH, 8, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        q, k, v = self.b(y).flatten(2).transpose(1, 2).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1)
        return self.c(mixed.transpose(1, 2).reshape(y.shape)).tanh()


def test_attention_of_convolutions() -> None:
    graph = adaptc.trace(randomise(Convolved()).eval(), (torch.randn(2, 4, 5, 5),), {"x": {0: "batch"}})
    found = roles_of(graph)
    assert found["b"] >= {Q, K, V}
    assert rows_of(graph, "b") == {Q: ((0, 16),), K: ((16, 32),), V: ((32, 48),)}


def test_a_transposed_convolution_is_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2, stride=2), nn.Tanh())
    graph = adaptc.trace(randomise(model).eval(), (torch.randn(2, 4, 5, 5),), {"input": {0: "batch"}})
    assert roles_of(graph) == {"0": set(), "2": {"head"}}


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_module_of_torch(batch_first: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.a(x, x, x, need_weights=False)[0]

    graph = traced(Own(), x=torch.randn(3, 5, WIDTH))
    assert roles_of(graph) == {"a": {Q, K, V}, "a.out_proj": {O}}
    assert rows_of(graph, "a") == {Q: ((0, 16),), K: ((16, 32),), V: ((32, 48),)}


@pytest.fixture(scope="module")
def nameless() -> Graph:
    return traced(Nameless(by_one_operation), x=torch.randint(0, WORDS, (3, 5)))


def planned(graph: Graph, target: Any, **entry: Any) -> Plan:
    """What a spec's target chooses."""
    return make_plan(load({"adapt": [{"method": "lora", "target": target, "r": 1, **entry}]}), graph)


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ({"role": "attention.output"}, ["c"]),
        ({"role": "feed_forward.*"}, ["d", "e", "f"]),
        ({"role": "head"}, ["h"]),
        ({"role": "embedding"}, ["a"]),
        ({"op": "embedding"}, ["a"]),
        ({"op": "linear", "role": "feed_forward.gate"}, ["d"]),
        ({"type": "Linear", "name": "[c-e]"}, ["c", "d", "e"]),
        ("b[q,v]", ["b[q]", "b[v]"]),
        ("b[value]", ["b[value]"]),
        ("*[k]", ["b[k]"]),
        (["b[0:4]", "b[40:]"], ["b[0:4]", "b[40:48]"]),
        ("b[:6, 12:18]", ["b[0:6]", "b[12:18]"]),
    ],
)
def test_what_a_target_chooses(nameless: Graph, target: Any, chosen: list[str]) -> None:
    assert [site.pattern for site in planned(nameless, target).sites] == chosen


def test_a_role_of_a_fused_weight_is_its_rows(nameless: Graph) -> None:
    sites = planned(nameless, {"role": "attention.value"}).sites
    assert [site.rows for site in sites] == [heads(2, size=4)]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"role": "attention.valeu"}, ["unknown role 'attention.valeu'", "attention.value"]),
        ("c[q]", ["c", "q"]),
        ("b[gate]", ["b", "gate", "q, k, v"]),
        ("b[q,gate]", ["b", "gate"]),
        ("b[0:99]", ["b", "0:99", "48"]),
        ("b[50:60]", ["b", "50:60", "48"]),
        ("b[9:3]", ["b", "9:3"]),
        ({"op": "linaer"}, ["linaer", "linear"]),
        ({"op": "conv2d"}, ["conv2d", "linear"]),
    ],
    ids=str,
)
def test_what_a_target_cannot_choose(nameless: Graph, target: Any, words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        planned(nameless, target)
    text = str(error.value)
    assert "adapt.0.target" in text
    for word in words:
        assert word in text, text


def test_a_role_that_no_layer_has_names_those_there_are() -> None:
    graph = traced(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True), src=torch.randn(3, 5, WIDTH)
    )
    with pytest.raises(SpecError) as error:
        planned(graph, {"role": "feed_forward.gate"})
    for word in ("feed_forward.gate", "attention.query", "feed_forward.in"):
        assert word in str(error.value)
