"""Methods and options that PEFT cannot run: held against a few lines of the papers' own equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.methods.method import METHODS
from tests.families import Zoo, close, differs, inputs, perturb, randomise


class One(nn.Module):
    """A layer and a normalisation."""

    def __init__(self, inner: int = 24, outer: int = 12) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(inner, outer), nn.LayerNorm(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


def one(method: str, **options: Any) -> tuple[Compiled, nn.Module, dict[str, torch.Tensor]]:
    """A method on the layer with random parameters: compiled, the base, and the trained tensors."""
    base = randomise(One())
    compiled = adaptc.compile(
        {"adapt": [{"method": method, "target": "*", **options}]},
        model=base,
        example_inputs=(torch.randn(3, 24),),
        dynamic={"x": {0: "batch"}},
    )
    perturb(compiled.module)
    return compiled, base, {n: p.detach() for n, p in compiled.module.named_parameters() if p.requires_grad}


def check(compiled: Compiled, base: nn.Module, changed: dict[str, torch.Tensor]) -> None:
    """The module and its fold compute what the base does with these tensors."""
    x = torch.randn(5, 24)
    with torch.no_grad():
        before, other = base(x), copy.deepcopy(base)  # whose tensors are not the module's
        other.load_state_dict(base.state_dict() | changed)
        want = other(x)
        close(compiled.module.eval()(x), want)
        close(compiled.fold()(x), want)
    differs(want, before)


def cayley(S: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(len(S))
    return (identity - S) @ torch.linalg.inv(identity + S)


def butterfly(n: int, b: int, i: int) -> torch.Tensor:
    """P_i of BOFT as a matrix: within blocks of 2^i b, even halves of b first, then odd ones."""
    order, half = [], b // 2
    for start in range(0, n, b * 2**i):
        halves = [list(range(s, s + half)) for s in range(start, start + b * 2**i, half)]
        order += [place for group in (halves[0::2], halves[1::2]) for piece in group for place in piece]
    return torch.eye(n)[order]


@pytest.mark.parametrize(("b", "m"), [(2, 1), (2, 2), (4, 2), (2, 3), (3, 1)])
def test_boft_with_butterfly_factors(b: int, m: int) -> None:
    compiled, base, theta = one("boft", target="layer", block_size=b, n_butterfly_factor=m)
    X, s = theta["layer.boft_R.default"], theta["layer.boft_s.default"]
    M = torch.eye(24)
    for i in range(m):
        D = torch.block_diag(*[cayley((block - block.T) / 2) for block in X[i]])
        P = butterfly(24, b, i) if i else torch.eye(24)
        M = P @ D @ P.T @ M
    check(compiled, base, {"layer.weight": s * (base.state_dict()["layer.weight"] @ M.T)})


def test_boft_turns_every_input_into_every_other() -> None:
    """As section 4 says: m factors of blocks of two connect 2^m inputs."""
    method = METHODS["boft"](block_size=2, n_butterfly_factor=3)  # type: ignore[call-arg]
    X = torch.randn(3, 4, 2, 2)
    turned = method.weight(torch.eye(8), X=X, s=torch.ones(8, 1))  # type: ignore[attr-defined]
    assert (turned.abs() > 1e-6).all()
    close(turned @ turned.T, torch.eye(8))
    two = METHODS["boft"](block_size=2, n_butterfly_factor=2)  # type: ignore[call-arg]
    assert (two.weight(torch.eye(8), X=X[:2], s=torch.ones(8, 1)) == 0).any()  # type: ignore[attr-defined]


def test_bitfit_moves_every_bias_and_nothing_else() -> None:
    compiled, base, theta = one("bitfit")
    assert set(theta) == {"layer.bitfit_delta.default.bias", "norm.bitfit_delta.default.bias"}
    state = base.state_dict()
    moved = {
        f"{m}.bias": state[f"{m}.bias"] + theta[f"{m}.bitfit_delta.default.bias"] for m in ("layer", "norm")
    }
    check(compiled, base, moved)


def test_layernorm_replaces_gains_and_biases() -> None:
    compiled, base, theta = one("layernorm")
    leaves = {f"norm.{leaf}": theta[f"norm.ln_tuning_layers.default.{leaf}"] for leaf in ("weight", "bias")}
    assert len(theta) == 2
    check(compiled, base, leaves)


def test_oft_with_the_exact_inverse_turns_and_keeps_lengths() -> None:
    compiled, base, theta = one("oft", target="layer", block_size=8, use_cayley_neumann=False)
    W, upper = base.state_dict()["layer.weight"], theta["layer.oft_R.default.weight"]
    rows, columns = torch.triu_indices(8, 8, 1)
    blocks = []
    for row in upper:
        Q = torch.zeros(8, 8)
        Q[rows, columns] = row
        blocks.append(cayley(Q - Q.T))
    turned = W @ torch.block_diag(*blocks).T
    close(turned.norm(dim=1), W.norm(dim=1))
    close(turned @ turned.T, W @ W.T)  # the angles between neurons
    check(compiled, base, {"layer.weight": turned})


@pytest.mark.parametrize("r", [2, 4, 6])
def test_hra_is_a_product_of_reflections(r: int) -> None:
    compiled, base, theta = one("hra", target="layer", r=r)
    W = base.state_dict()["layer.weight"]
    for u in theta["layer.hra_u.default"].T:
        W = W - 2 * torch.outer(W @ u, u) / u.dot(u)
    check(compiled, base, {"layer.weight": W})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_lora_takes_out_of_the_weight(init: str) -> None:
    compiled, base, theta = one("lora", target="layer", r=3, alpha=6, init_weights=init)
    W = base.state_dict()["layer.weight"].double()
    if init == "pissa":
        U, S, V = torch.linalg.svd(W)
        taken = U[:, :3] @ torch.diag(S[:3]) @ V[:3]
    else:
        Q, R = torch.linalg.qr(W)
        taken = 2 * Q[:, :3] @ R[:3]
    A, B = (theta[f"layer.lora_{x}.default.weight"].double() for x in "AB")
    check(compiled, base, {"layer.weight": (W - taken + 2 * B @ A).float()})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_taken_out_does_not_move_with_an_earlier_adapter(init: str, tmp_path: Any) -> None:
    """A0 and B0 follow from the base, which is the same when the checkpoints are loaded again."""
    base, x = randomise(One()), torch.randn(5, 24)
    entries = [
        {"method": "lora", "target": "layer", "r": 2, "name": "first"},
        {"method": "lora", "target": "layer", "r": 3, "name": "second", "init_weights": init},
    ]

    def compiled(adapt: Any) -> Compiled:
        return adaptc.compile(
            {"adapt": adapt}, model=base, example_inputs=(torch.randn(3, 24),), dynamic={"x": {0: "n"}}
        )

    made = compiled(entries)
    with torch.no_grad():
        close(made.module.eval()(x), base(x))
    perturb(made.module)
    made.save_adapter(tmp_path)
    with torch.no_grad():
        want = made.module(x)
        close(made.fold()(x), want)
        close(compiled([{"adapter": str(tmp_path)}]).module.eval()(x), want)


def test_orthogonal_initialisation_is_random_and_gives_nothing(zoo: Zoo) -> None:
    compiled = zoo.compiled("bert", [{"method": "lora", "target": "*.query", "init_weights": "orthogonal"}])
    state = compiled.module.state_dict()
    A, B = (state[f"bert.encoder.layer.0.attention.self.query.lora_{x}.default.weight"] for x in "AB")
    assert A.std().item() > 0.01
    assert B.std().item() > 0.01
    assert (B @ A).abs().max().item() < 1e-6
    tensors = inputs("bert", 2, 5)
    close(compiled.module.eval()(**tensors)["logits"], zoo.run_eager("bert", tensors)["logits"])


def test_a_tied_embedding_and_its_head_change_together(zoo: Zoo, tmp_path: Any) -> None:
    """Trainable tokens on tied weights, as PEFT has them: the words change where they are read and where they are
    scored.
    """
    peft = pytest.importorskip("peft")
    assert zoo.eager("gpt2").config.tie_word_embeddings
    model = peft.get_peft_model(
        zoo.fresh("gpt2"), peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[4, 9])
    )
    perturb(model)
    model.save_pretrained(tmp_path)
    compiled = zoo.compiled("gpt2", [{"adapter": str(tmp_path)}])
    tensors = inputs("gpt2", 2, 5)
    tensors["input_ids"][0, :2] = torch.tensor([4, 9])
    with torch.no_grad():
        want = model.eval()(**tensors, use_cache=False).logits
        close(compiled.module.eval()(**tensors)["logits"], want)
        close(compiled.fold()(**tensors)["logits"], want)
        differs(want, zoo.run_eager("gpt2", tensors)["logits"])


def test_trained_words_and_a_head_are_two_checkpoints(zoo: Zoo, tmp_path: Any) -> None:
    """PEFT's configuration of trainable tokens has no place for other modules: it would lose the head."""
    entries = [
        {"method": "trainable-tokens", "target": "*.word_embeddings", "token_indices": [4, 9]},
        {"method": "full", "target": "classifier"},
    ]
    compiled = zoo.compiled("bert", entries)
    perturb(compiled.module)
    compiled.save_adapter(tmp_path)
    assert (tmp_path / "adapters.json").is_file()
    again = zoo.compiled("bert", [{"adapter": str(tmp_path)}])
    tensors = inputs("bert", 2, 5)
    with torch.no_grad():
        close(again.module.eval()(**tensors)["logits"], compiled.module.eval()(**tensors)["logits"])


def test_blocks_are_told_by_size_or_by_number() -> None:
    asked: list[tuple[str, dict[str, int], tuple[int, ...]]] = [
        ("oft", {"r": 4}, (4, 15)),
        ("oft", {"block_size": 6}, (4, 15)),
        ("oft", {}, (1, 276)),
        ("boft", {"block_num": 4}, (1, 4, 6, 6)),
        ("boft", {}, (1, 6, 4, 4)),
    ]
    for name, options, shape in asked:
        theta = one(name, target="layer", **options)[2]
        assert shape in {tuple(value.shape) for value in theta.values()}, (name, options)


@pytest.mark.parametrize("target", ["*.wte", "lm_head"])
def test_share_changes_a_tied_tensor_wherever_it_is_used(zoo: Zoo, target: str) -> None:
    """Whichever of the two layers is named: the embedding runs first, the head last."""
    compiled = zoo.compiled("gpt2", [{"method": "lora", "target": target, "r": 4, "on_alias": "share"}])
    perturb(compiled.module)
    folded, model = compiled.fold(), zoo.fresh("gpt2")
    name = "transformer.wte.weight"
    state = folded.state_dict()
    differs(state[name], model.state_dict()[name])
    assert torch.equal(state[name], state["lm_head.weight"])
    with torch.no_grad():
        model.get_parameter(name).copy_(state[name])
        tensors = inputs("gpt2", 2, 5)
        want = model(**tensors, use_cache=False).logits
        close(folded(**tensors)["logits"], want)
        close(compiled.module.eval()(**tensors)["logits"], want)
