"""New heads: what they read of a text, wherever its padding is, and where they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.methods.head import first_token, last_token, mean_of_tokens
from tests.families import Zoo, close, inputs, perturb

H = torch.arange(24.0).view(2, 4, 3)
RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()


class Encoder(nn.Module):
    """Embeddings mixed by an attention, as features; and a vector for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.q, self.v = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        scores = (self.q(x) @ x.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -1e4)
        return {"features": scores.softmax(-1) @ self.v(x), "row": x.sum(1)}


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.int64)}


def compiled(*adapt: Any, model: nn.Module | None = None) -> adaptc.Compiled:
    dynamic = {name: {0: "batch", 1: "seq"} for name in batch()}
    return adaptc.compile(
        {"adapt": list(adapt)}, model=model or Encoder().eval(), example_inputs=batch(), dynamic=dynamic
    )


def test_tokens_are_read_wherever_padding_is() -> None:
    for m, second in ((RIGHT, H[1, :2]), (LEFT, H[1, 2:])):
        assert torch.equal(mean_of_tokens(H, m), torch.stack([H[0].mean(0), second.mean(0)]))
        assert torch.equal(first_token(H, m), torch.stack([H[0, 0], second[0]]))
        assert torch.equal(last_token(H, m), torch.stack([H[0, 3], second[1]]))
    assert torch.equal(mean_of_tokens(H, torch.zeros(2, 4).bool()), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "last"},
        pytest.param({"head": "mlp", "width": 5, "pool": "first"}, marks=pytest.mark.slow),
        pytest.param({"head": "attention"}, marks=pytest.mark.slow),
        pytest.param({"pool": "none"}, marks=pytest.mark.slow),
    ],
)
def test_a_probe_is_its_equation(options: dict[str, Any]) -> None:
    made = compiled({"method": "probe", "classes": 4, **options})
    perturb(made.module)
    assert made.graph.outputs == ("logits", "row")
    given = batch()
    given["attention_mask"][1, :2] = given["attention_mask"][2, 3:] = 0
    theta = {
        name.split(".")[1]: dict[str, Tensor]()
        for name, _ in made.module.named_parameters()
        if "probe" in name
    }
    for name, p in made.module.named_parameters():
        if "probe" in name:
            theta[name.split(".")[1]][name.split(".")[-1]] = p
    with torch.no_grad():
        got = made.module.eval()(**given)["logits"]
        h = Encoder().eval()(**given)["features"]
        rows = []
        for features, mask in zip(h, given["attention_mask"].bool(), strict=True):
            real = features[mask]
            if options.get("head") == "attention":
                shares = (real @ theta["probe_query"]["default"] / 8**0.5).softmax(0)
                x = shares @ real
            elif options.get("pool") == "none":
                x = features
            else:
                x = real[{"last": -1, "first": 0}[options["pool"]]]
            if options.get("head") == "mlp":
                x = F.linear(x, theta["probe_in"]["weight"], theta["probe_in"]["bias"]).tanh()
            rows.append(F.linear(x, theta["probe_out"]["weight"], theta["probe_out"]["bias"]))
    torch.testing.assert_close(got, torch.stack(rows))


def test_a_reward_takes_the_place_of_a_decoders_words(zoo: Zoo, tmp_path: Path) -> None:
    made = zoo.compiled("llama", [{"method": "reward"}])
    perturb(made.module)
    assert made.graph.outputs == ("rewards",)
    given = inputs("llama", 3, 6)
    given["attention_mask"][1, :2] = given["attention_mask"][2, 4:] = 0
    with torch.no_grad():
        got = made.module.eval()(**given)["rewards"]
        h = zoo.eager("llama").model(**given).last_hidden_state  # type: ignore[operator, union-attr]
    w = next(p for n, p in made.module.named_parameters() if "reward_head" in n)
    last = torch.stack([h[0, 5], h[1, 5], h[2, 3]])
    close(got, (last @ w.T).squeeze(-1).detach())
    made.emit("onnx", tmp_path / "m.onnx", adapters="live")
    close(torch.as_tensor(session_call(open_session(tmp_path / "m.onnx"))(given)[0]), got)


def test_two_heads_share_a_model() -> None:
    made = compiled(
        {"method": "probe", "classes": 2, "target": "features"},
        {"method": "probe", "classes": 5, "target": "features", "name": "topic", "output": "topic"},
        {"method": "reward", "target": "row", "name": "third"},
    )
    out = made.module.eval()(**batch())
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "logits": (3, 2), "rewards": (3,), "topic": (3, 5),
    }  # fmt: skip


class Classifier(Encoder):
    """An encoder with a classifier, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = self.classifier(super().forward(input_ids, attention_mask)["features"].mean(1))
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def test_where_a_head_cannot_be_is_told() -> None:
    probe = {"method": "probe"}
    with pytest.raises(
        adaptc.SpecError, match=r"the model gives row already\n.*give this entry another `output`"
    ):
        compiled({**probe, "output": "row"})
    with pytest.raises(
        adaptc.SpecError, match="none gives every token classes, and here is one vector in each row"
    ):
        compiled({**probe, "pool": "none", "target": "row"})
    with pytest.raises(adaptc.SpecError, match="attention pools all tokens"):
        compiled({**probe, "pool": "none", "head": "attention"})
    with pytest.raises(adaptc.SpecError, match=r"matches no head of .*\n.*such layers are: features, row"):
        compiled({**probe, "target": "nowhere"})
    labelled = {"input_ids": batch()["input_ids"], **batch(), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(
        adaptc.SpecError, match=r"loss is computed from the head that the model had\n.*leave labels out"
    ):
        adaptc.compile(
            {"adapt": [{**probe, "target": "logits"}]}, model=Classifier().eval(), example_inputs=labelled
        )
