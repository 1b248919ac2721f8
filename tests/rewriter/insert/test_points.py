"""What is inserted into activations, attentions and inputs, held against references of a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled
from tests.families import Zoo, close, differs, inputs, marked, outputs, perturb, randomise

BEHIND = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "bert": ["attention.output.dense", "output.dense"],
    "t5": ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"],
    "vit": ["attention.o_proj", "mlp.fc2"],
    "block": ["out", "narrow"],
}
"""What makes a sub-layer's output, told by hand."""
BEFORE = {
    "llama": {"self_attn.o_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.gate_proj"},
    "gpt2": {"attn.c_proj": "attn.c_attn", "mlp.c_proj": "mlp.c_fc"},
    "bert": {"attention.output.dense": "attention.self.query", "output.dense": "intermediate.dense"},
    "vit": {"attention.o_proj": "attention.q_proj", "mlp.fc2": "mlp.fc1"},
    "block": {"out": "query", "narrow": "wide"},
}
"""What reads a sub-layer's input first."""


def trained(zoo: Zoo, name: str, entry: dict[str, Any]) -> tuple[Compiled, dict[str, Tensor]]:
    """A compiled model with perturbed adapters, and those."""
    compiled = zoo.compiled(name, [entry])
    perturb(compiled.module, seed=3)
    return compiled, {n: p for n, p in compiled.module.named_parameters() if p.requires_grad}


def feed_forward(theta: dict[str, Tensor], site: str, method: str, z: Tensor, scale: float = 1.0) -> Tensor:
    def of(leaf: str, kind: str) -> Tensor:
        return theta[f"{site}.{method}_{leaf}.default.{kind}".lstrip(".")]

    inner = F.gelu(z @ of("down", "weight").T + of("down", "bias"))
    return scale * (inner @ of("up", "weight").T + of("up", "bias"))


@pytest.mark.parametrize("name", marked(BEHIND, ("llama", "block")))
def test_a_bottleneck_stands_behind_every_sublayer(zoo: Zoo, name: str) -> None:
    compiled, theta = trained(zoo, name, {"method": "bottleneck", "r": 4, "activation": "gelu", "scale": 0.7})
    model = zoo.fresh(name)
    ends = [n for n, _ in model.named_modules() if any(n.endswith(e) for e in BEHIND[name])]
    if name == "bert":  # `output.dense` ends the name of the attention's too
        ends = [n for n in ends if n.count(".") > 3]
    assert sorted(a.site.module for a in compiled.graph.adaptations) == sorted(ends)
    for end in ends:
        model.get_submodule(end).register_forward_hook(
            lambda _, __, h, end=end: h + feed_forward(theta, end, "bottleneck", h, 0.7)
        )
    for batch, length in ((2, 5), (1, 1), (3, 7)):
        tensors = inputs(name, batch, length, pad=batch == 2)
        with torch.no_grad():
            want = zoo.run_eager(name, tensors, model)
            got = outputs(compiled.module.eval(), tensors, compiled.graph.outputs)
        for key in want:
            close(got[key], want[key])
        differs(want[compiled.graph.outputs[0]], zoo.run_eager(name, tensors)[compiled.graph.outputs[0]])


@pytest.mark.parametrize("name", marked(BEFORE, ("bert", "block")))
def test_a_parallel_adapter_reads_the_input(zoo: Zoo, name: str) -> None:
    entry = {"method": "parallel", "r": 4, "activation": "gelu", "scale": 4.0}
    compiled, theta = trained(zoo, name, entry)
    model, seen = zoo.fresh(name), dict[str, Tensor]()
    for end in (a.site.module for a in compiled.graph.adaptations):
        last, first = next((e, f) for e, f in BEFORE[name].items() if end.endswith(e))
        start = end.removesuffix(last) + first
        model.get_submodule(start).register_forward_pre_hook(
            lambda _, given, end=end: seen.update({end: given[0]})
        )
        model.get_submodule(end).register_forward_hook(
            lambda _, __, h, end=end: h + feed_forward(theta, end, "parallel", seen[end], 4.0)
        )
    tensors = inputs(name, 2, 5, pad=True)
    with torch.no_grad():
        want = zoo.run_eager(name, tensors, model)
        got = outputs(compiled.module.eval(), tensors, compiled.graph.outputs)
    for key in want:
        close(got[key], want[key])


def test_compacter_is_a_sum_of_kronecker_products(zoo: Zoo) -> None:
    entry = {"method": "compacter", "r": 4, "phm_dim": 2, "phm_rank": 2, "activation": "gelu"}
    compiled, theta = trained(zoo, "block", entry)
    rule = theta["compacter_rule.default"]
    whole = dict[str, Tensor]()
    for site in ("out", "narrow"):
        for side in ("down", "up"):
            left, right = (theta[f"{site}.compacter_{side}_{leaf}.default"] for leaf in ("left", "right"))
            W = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(2))
            assert isinstance(W, Tensor)
            whole[f"{site}.x_{side}.default.weight"] = W
            whole[f"{site}.x_{side}.default.bias"] = theta[f"{site}.compacter_{side}.default.bias"]
    assert whole["out.x_down.default.weight"].shape == (4, 32)
    model = zoo.fresh("block")
    for site in ("out", "narrow"):
        model.get_submodule(site).register_forward_hook(
            lambda _, __, h, site=site: h + feed_forward(whole, site, "x", h)
        )
    tensors = inputs("block", 3, 6, pad=True)
    with torch.no_grad():
        want = zoo.run_eager("block", tensors, model)["output"]
        got = outputs(compiled.module.eval(), tensors, ("output",))["output"]
    close(got, want)
    folded = compiled.fold()
    assert not [name for name in folded.state_dict() if "left" in name or "rule" in name]


# attentions


class Attend(nn.Module):
    """One attention, spelled in one of many ways, and what comes before and after it."""

    def __init__(self, form: str, heads: int = 2, groups: int = 2, width: int = 8) -> None:
        super().__init__()
        self.form, self.heads, self.groups = form, heads, groups
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, width // heads * groups) for _ in range(2))
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True) if form.startswith("mha") else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.mha is not None:
            return (
                x + self.mha(x, x, x, key_padding_mask=mask == 0, need_weights=self.form == "mha-weights")[0]
            )
        return x + self.o(self.mixed(x, mask).transpose(1, 2).flatten(2))

    def mixed(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, seq, size)"""
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        if self.groups < self.heads and self.form != "gqa":
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        seen, size = mask[:, None, None, :] > 0, q.shape[-1]
        match self.form:
            case "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "gqa":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            case "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / size**0.5
                scores = torch.where(seen, scores, -1e9)
                return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
            case "flat":
                flat = [t.flatten(0, 1) for t in (q, k, v)]
                bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, -1e9)
                scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) * size**-0.5
                scores = scores.view(-1, self.heads, x.shape[1], x.shape[1]) + bias[:, None, None, :]
                mixed = torch.bmm(scores.softmax(-1).view(-1, x.shape[1], x.shape[1]), flat[2])
                return mixed.view(x.shape[0], self.heads, x.shape[1], size)
        scores = (q @ k.mT / size**0.5).masked_fill(~seen, -1e9)
        return scores.softmax(-1) @ v


def by_hand(model: Attend, x: Tensor, mask: Tensor, P: Tensor) -> Tensor:
    """The same with P (n, heads (key size + value size)) in front, one query at a time."""
    if model.mha is not None:
        packed = zip(model.mha.in_proj_weight.chunk(3), model.mha.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b) for w, b in packed)
        out = model.mha.out_proj
    else:
        (q, k, v), out = (f(x) for f in (model.q, model.k, model.v)), model.o
    n, heads, groups = len(P), model.heads, model.groups
    first, second = P.split(P.shape[1] // 2, 1)
    rows = []
    for b in range(len(x)):
        parts = []
        for h in range(heads):
            g = h * groups // heads
            size = q.shape[-1] // heads
            K, V = (
                torch.cat([p[:, g * size : (g + 1) * size], t[b, :, g * size : (g + 1) * size]])
                for p, t in ((first, k), (second, v))
            )
            scores = q[b, :, h * size : (h + 1) * size] @ K.T / size**0.5
            hidden = F.pad(mask[b] == 0, (n, 0))[None].expand(len(scores), -1)
            if model.form == "causal":
                hidden = F.pad(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, (n, 0))
            parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ V)
        rows.append(torch.cat(parts, -1))
    return x + out(torch.stack(rows))


OTHERS_STAND_FOR = (("matmul", 2), ("causal", 2), ("mha-weights", 2), ("matmul", 1))
FORMS = [
    pytest.param(form, groups, marks=[pytest.mark.slow] * ((form, groups) in OTHERS_STAND_FOR))
    for form, groups in (
        *((form, 2) for form in ("matmul", "causal", "einsum", "flat", "mha", "mha-weights")),
        *((form, 1) for form in ("matmul", "gqa", "causal")),
    )
]


@pytest.mark.parametrize(("form", "groups"), FORMS)
@pytest.mark.parametrize("method", marked(["prefix", "p-tuning-v2"], ["prefix"]))
def test_keys_and_values_in_front_of_every_spelling(form: str, groups: int, method: str) -> None:
    model = randomise(Attend(form, groups=groups)).eval()
    assert isinstance(model, Attend)
    x, mask = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.int64)
    compiled = adaptc.compile(
        {"adapt": [{"method": method, "num_virtual_tokens": 4}]},
        model=model,
        example_inputs=(x, mask),
        dynamic={"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}},
    ) if form != "causal" else adaptc.compile(
        {"adapt": [{"method": method, "num_virtual_tokens": 4}]},
        model=_OneInput(model),
        example_inputs=(x,),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )  # fmt: skip
    perturb(compiled.module, seed=2)
    (P,) = (p.detach() for p in compiled.module.parameters() if p.requires_grad)
    assert P.shape == (4, 2 * groups * 4), "each group of queries has keys of its own once"
    for batch, length, padded in ((2, 5, 2), (1, 1, 0), (4, 9, -3)):
        x, mask = torch.randn(batch, length, 8), torch.ones(batch, length, dtype=torch.int64)
        mask[0, slice(None, padded) if padded > 0 else slice(length + padded, None)] = 0
        given = (x,) if form == "causal" else (x, mask)
        with torch.no_grad():
            want = by_hand(model, x, mask, P)
            close(compiled.module.eval()(*given), want)
            close(compiled.fold()(*given), want)


class _OneInput(nn.Module):
    def __init__(self, inner: Attend) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.ones(x.shape[:2]))


class Counting(nn.Module):
    """Tokens with positions that the model counts, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.words, self.attend = way, nn.Embedding(20, 8), Attend("matmul")
        self.places = nn.Embedding(32, 8)
        self.register_buffer("numbers", torch.arange(32)[None], persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        length = ids.shape[1]
        match self.way:
            case "arange":
                at = torch.arange(length)
            case "buffer":
                at = self.numbers[:, :length]
            case "mask":
                at = mask.cumsum(1) - 1
                at = at * (at > 0)
        return self.attend(self.words(ids) + self.places(at), mask)


@pytest.mark.parametrize("way", ["arange", "buffer", "mask"])
def test_positions_are_counted_from_behind_the_prefix(way: str) -> None:
    model = randomise(Counting(way)).eval()
    assert isinstance(model, Counting)
    ids, mask = torch.randint(20, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    compiled = adaptc.compile(
        {"adapt": [{"method": "prefix", "num_virtual_tokens": 4}]},
        model=model,
        example_inputs=(ids, mask),
        dynamic={"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}},
    )
    P = compiled.graph.weights["prompt_embeddings.default"].load()
    with torch.no_grad():
        x = model.words(ids) + model.places(torch.arange(4, 11))
        close(compiled.module.eval()(ids, mask), by_hand(model.attend, x, mask, P))


# inputs


class Reads(nn.Module):
    """Tokens that are looked up, and one attention."""

    def __init__(self, width: int = 8, form: str = "matmul") -> None:
        super().__init__()
        self.words, self.attend = nn.Embedding(20, width), Attend(form, width=width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.attend(self.words(ids), mask)


def reads(entry: dict[str, Any], model: nn.Module, dtype: torch.dtype = torch.float32) -> Compiled:
    ids, mask = torch.randint(20, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    return adaptc.compile(
        {"adapt": [entry]},
        model=model.to(dtype),
        example_inputs=(ids, mask),
        dynamic={"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}},
    )


@pytest.mark.parametrize("positions", [[], [0, 1, 2], [1, 2, 5], [0, 3, 40], [2, 30, 40]])
def test_virtual_tokens_at_any_places(positions: list[int]) -> None:
    model = randomise(Reads()).eval()
    assert isinstance(model, Reads)
    entry = {"method": "prompt", "num_virtual_tokens": 3, "positions": positions}
    compiled = reads(entry, model)
    perturb(compiled.module, seed=1)
    P = compiled.graph.weights["prompt_embeddings.default"].load()
    for batch, length in ((2, 5), (1, 1), (3, 9)):
        ids, mask = torch.randint(20, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
        mask[0, : length // 2] = 0
        places = [min(at, length + i) for i, at in enumerate(positions or range(3))]
        rest = [i for i in range(length + 3) if i not in places]
        x, longer = torch.empty(batch, length + 3, 8), torch.ones(batch, length + 3)
        x[:, places], x[:, rest], longer[:, rest] = P, model.words(ids), mask.float()
        with torch.no_grad():
            want = model.attend(x, longer)[:, rest]
            close(compiled.module.eval()(ids, mask), want)
            close(compiled.fold()(ids, mask), want)


class Padded(Reads):
    """The same, told by torch's kind of mask."""

    def forward(self, ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        return super().forward(ids, (~key_padding_mask).long())


@pytest.mark.slow
def test_virtual_tokens_are_no_padding() -> None:
    model = randomise(Padded()).eval()
    entry = {"adapt": [{"method": "prompt", "num_virtual_tokens": 3}]}
    ids, padding = torch.randint(20, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    axes = {key: {0: "batch", 1: "seq"} for key in ("ids", "key_padding_mask")}
    compiled = adaptc.compile(entry, model=model, example_inputs=(ids, padding), dynamic=axes)
    plain = reads({"method": "prompt", "num_virtual_tokens": 3}, model_of(model))
    padding[0, 3:] = True
    with torch.no_grad():
        close(compiled.module.eval()(ids, padding), plain.module.eval()(ids, (~padding).long()))


def model_of(padded: nn.Module) -> Reads:
    """The same weights behind the other mask."""
    other = Reads()
    other.load_state_dict(padded.state_dict())
    return other.eval()


ENCODED = {
    "mlp": {"method": "p-tuning", "encoder_hidden_size": 6},
    "lstm": {
        "method": "p-tuning",
        "encoder_hidden_size": 6,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 2,
    },
}


@pytest.mark.slow
def test_the_lstm_is_torchs() -> None:
    model = randomise(Reads()).eval()
    compiled = reads({**ENCODED["lstm"], "num_virtual_tokens": 5}, model)
    perturb(compiled.module, seed=1)
    theta = {n: p.detach() for n, p in compiled.module.named_parameters() if p.requires_grad}
    lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for layer in range(2):
            for way, end in (("forward", ""), ("backward", "_reverse")):
                for ours, its in (("x", "ih"), ("h", "hh")):
                    name = f"prompt_lstm_{layer}_{way}_{ours}.default"
                    getattr(lstm, f"weight_{its}_l{layer}{end}").copy_(theta[f"{name}.weight"])
                    getattr(lstm, f"bias_{its}_l{layer}{end}").copy_(theta[f"{name}.bias"])
        hidden = lstm(theta["prompt_inputs.default"])[0]
        hidden = F.relu(hidden @ theta["prompt_mlp_0.default.weight"].T + theta["prompt_mlp_0.default.bias"])
        want = hidden @ theta["prompt_mlp_1.default.weight"].T + theta["prompt_mlp_1.default.bias"]
        plain = reads({"method": "prompt", "num_virtual_tokens": 5}, model)
        plain.module.get_parameter("prompt_embeddings.default").copy_(want)
        ids, mask = torch.randint(20, (2, 4)), torch.ones(2, 4, dtype=torch.int64)
        close(compiled.module.eval()(ids, mask), plain.module.eval()(ids, mask))


@pytest.mark.parametrize("kind", ["projected", *ENCODED])
def test_what_makes_the_tokens_is_folded_away(kind: str) -> None:
    entry = ENCODED.get(kind, {"method": "prefix", "projection": True, "encoder_hidden_size": 6})
    compiled = reads({**entry, "num_virtual_tokens": 3}, randomise(Reads()))
    folded, names = compiled.fold(), set(dict(compiled.module.named_parameters()))
    made = {n for n in folded.state_dict() if n not in compiled.base.weights}
    assert not made & names
    assert sum(folded.state_dict()[n].numel() for n in made) == {"projected": 3 * 16}.get(kind, 3 * 8)
    assert any("stays in every artifact" in note for note in compiled.plan.notes)
    assert 0 < compiled.plan.budget.folded_flops <= compiled.plan.budget.added_flops


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "bottleneck", "r": 3, "activation": "gelu"},
        {"method": "parallel", "r": 3, "activation": "tanh"},
        {"method": "compacter", "r": 4, "phm_dim": 2, "activation": "silu"},
        {"method": "prefix", "num_virtual_tokens": 2},
        {"method": "prefix", "num_virtual_tokens": 2, "projection": True, "encoder_hidden_size": 3},
        {"method": "p-tuning-v2", "num_virtual_tokens": 2},
        {"method": "prompt", "num_virtual_tokens": 2},
        {"method": "p-tuning", "num_virtual_tokens": 2, "positions": [1, 3], "encoder_hidden_size": 3},
        {**ENCODED["lstm"], "num_virtual_tokens": 2, "encoder_hidden_size": 2},
    ],
    ids=lambda entry: "-".join(str(value) for value in entry.values()),
)
def test_gradients_are_those_of_finite_differences(entry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    compiled = reads(entry, randomise(Reads(width=4)), torch.float64)
    module = compiled.module
    perturb(module, seed=5)
    named = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.requires_grad}
    ids, mask = torch.randint(20, (2, 3)), torch.tensor([[1, 1, 1], [0, 1, 1]])

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(named, values, strict=True))
        return torch.func.functional_call(module, given, (ids, mask))

    assert all(p.dtype == torch.float64 for p in named.values())
    assert torch.autograd.gradcheck(function, tuple(named.values()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", marked(["bottleneck", "prefix", "prompt", "p-tuning"], ["prefix", "prompt"])
)
def test_padding_on_either_side_is_not_seen(zoo: Zoo, method: str, side: str) -> None:
    """A row among longer ones gives what it gives alone: a model without positions shows it exactly."""
    model = randomise(Reads()).eval()
    options = {"bottleneck": {"r": 3}}.get(method, {"num_virtual_tokens": 3})
    compiled = reads({"method": method, **options}, model)
    perturb(compiled.module, seed=1)
    ids, mask = torch.randint(20, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    real = slice(4, None) if side == "left" else slice(None, 2)
    mask[0] = 0
    mask[0, real] = 1
    with torch.no_grad():
        whole = compiled.module.eval()(ids, mask)[0, real]
        alone = compiled.module.eval()(ids[:1, real], mask[:1, real])[0]
    close(whole, alone)
    differs(alone, model(ids[:1, real], mask[:1, real])[0].detach())


def test_adapterdrop_leaves_out_layers(zoo: Zoo) -> None:
    entry = {"method": "bottleneck", "r": 4, "target": {"role": "feed_forward.out", "layers": "1"}}
    compiled = zoo.compiled("bert", [entry])
    assert [a.site.module for a in compiled.graph.adaptations] == ["bert.encoder.layer.1.output.dense"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_two_prefixes_are_a_longer_one(zoo: Zoo, name: str) -> None:
    """The second stands in front of the first, and everything counts on behind both."""
    both = zoo.compiled(
        name, [{"method": "prefix", "num_virtual_tokens": n, "name": f"p{n}"} for n in (3, 2)]
    )
    one = zoo.compiled(name, [{"method": "prefix", "num_virtual_tokens": 5}])
    first, second = (both.graph.weights[f"prompt_embeddings.p{n}"].load() for n in (3, 2))
    tensors = inputs(name, 2, 6, pad=True)
    with torch.no_grad():
        one.module.get_parameter("prompt_embeddings.default").copy_(torch.cat([second, first]))
        got, want = (outputs(c.module.eval(), tensors, c.graph.outputs) for c in (both, one))
    for key in want:
        close(got[key], want[key])


@pytest.mark.slow
def test_all_kinds_at_once(zoo: Zoo, tmp_path: Path) -> None:
    entries = [
        {"method": "lora", "target": "*_proj", "r": 2},
        {"method": "prefix", "num_virtual_tokens": 3},
        {"method": "bottleneck", "r": 4},
        {"method": "parallel", "r": 4, "name": "beside"},
        {"method": "prompt", "num_virtual_tokens": 4, "name": "words"},
    ]
    compiled = zoo.compiled("llama", entries)
    perturb(compiled.module, seed=1)
    compiled.save_adapter(tmp_path)
    again = zoo.compiled("llama", [{"adapter": str(tmp_path)}])
    tensors = inputs("llama", 2, 5, pad=True)
    with torch.no_grad():
        want = outputs(compiled.module.eval(), tensors, ("logits",))["logits"]
        close(outputs(compiled.fold(), tensors, ("logits",))["logits"], want)
        assert torch.equal(outputs(again.module.eval(), tensors, ("logits",))["logits"], want)
