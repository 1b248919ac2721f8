"""What methods do at each step of a training: PEFT's allocator, the papers' masks, and who is left afterwards."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import Zoo, close, entry, inputs, outputs, perturb, without_cache
from tests.parity.test_peft import tensors_in

WIDTH = 12


class Net(nn.Module):
    """Two layers, and a loss if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.down(torch.tanh(self.up(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(seed: int = 0, rows: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    return {"x": x, "labels": (x[:, :3]).argmax(-1)}


def compiled(*adapt: dict[str, Any], calibration: Any = None, **spec: Any) -> Compiled:
    dynamic = {"x": {0: "batch"}, "labels": {0: "batch"}}
    return adaptc.compile(
        {"adapt": list(adapt), **spec},
        model=Net(),
        example_inputs=data(),
        dynamic=dynamic,
        calibration=calibration,
    )


def in_peft(zoo: Zoo, adapter: Path) -> nn.Module:
    """The family's BERT with a saved adapter, as PEFT loads it."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(zoo.fresh("bert"), adapter).eval()


def train(module: Any, step: Any, count: int, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    losses = []
    for number in range(count):
        loss = module(**data(number))["loss"]
        loss.backward()
        step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ADALORA = {
    **{"method": "adalora", "target": ["up", "down"], "init_r": 3, "target_r": 1, "alpha": 6},
    **{"tinit": 4, "tfinal": 6, "deltaT": 2},
}


@pytest.mark.filterwarnings("ignore:Adapter .default.. 2 LoRA tensor")  # of a layer that keeps no rank
def test_adalora_gives_up_the_ranks_that_peft_gives_up(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT's allocator and ours beside one another, on the same gradients."""
    peft = pytest.importorskip("peft")
    total, name = 20, "bert"
    options = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "lora_alpha": 6}
    targets = ["query", "value", "dense"]
    config = peft.AdaLoraConfig(target_modules=targets, total_step=total, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(zoo.fresh(name), config).eval()
    adapt = [
        {"method": "adalora", "target": [f"*.{t}" for t in targets], "exclude": ["classifier"], **options}
    ]
    ours = zoo.compiled(name, adapt).module.eval()
    named = {
        n.replace("base_model.model.", ""): p
        for n, p in theirs.named_parameters()
        if "lora_" in n and p.requires_grad
    }
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(own) == set(named)
    perturb(theirs)
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(named[n])
    step = adaptc.TrainingStep(ours, steps=total)
    optimizers = [torch.optim.SGD(ps.values(), lr=0.05) for ps in (own, named)]
    for number in range(1, total + 1):
        tensors = inputs(name, 3, 6, seed=number)
        labels = torch.tensor([0, 1, number % 2])
        mine = nn.functional.cross_entropy(ours(**tensors)["logits"], labels)
        mine.backward()
        step(optimizers[0])
        optimizers[0].zero_grad()
        # Not `theirs` itself: without a task_type PEFT goes past the model that adds the penalty.
        theirs.base_model(**tensors, labels=labels).loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(number)
        optimizers[1].zero_grad()
        for n, p in own.items():
            close(p, named[n], 4096)  # up to 20 steps, each with its own rounding
    left = [int((p != 0).sum()) for n, p in own.items() if "lora_E" in n]
    assert sum(left) == 2 * len(left)
    assert len(set(left)) > 1, "every layer kept as many: nothing was allocated"
    theirs.save_pretrained(tmp_path)
    assert any(len(v) < 4 for k, v in tensors_in(tmp_path).items() if "lora_E" in k)
    again = zoo.compiled(name, [{"adapter": str(tmp_path)}])
    with torch.no_grad():
        close(again.module.eval()(**tensors)["logits"], theirs.base_model(**tensors).logits)


def test_given_up_ranks_are_in_no_checkpoint_fold_or_live_export(tmp_path: Path) -> None:
    made = compiled(ADALORA)
    module = made.module
    step = adaptc.TrainingStep(module, steps=24)
    losses = train(module, step, 24)
    assert losses[-1] < losses[0]
    module.eval()
    made.save_adapter(tmp_path / "a")
    held = tensors_in(tmp_path / "a")
    ranks = {key: len(value) for key, value in held.items() if key.endswith("lora_E")}
    assert sum(ranks.values()) == 2
    pattern = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    assert {key: sum(kept) for key, kept in pattern.items()} == {
        key.removeprefix("base_model.model."): rank for key, rank in ranks.items()
    }
    again = compiled({"adapter": str(tmp_path / "a")})
    want = module(**data(99))["logits"].detach()
    close(again.module.eval()(**data(99))["logits"].detach(), want)
    close(made.fold()(**data(99))["logits"].detach(), want)
    for number, source in enumerate((made, again)):
        path = tmp_path / f"{number}.onnx"
        source.emit("onnx", path, adapters="live")
        close(onnx_runner(path)({"x": data(99)["x"]})[0], want)
        import onnx

        stored = {i.name: list(i.dims) for i in onnx.load(path).graph.initializer if "lora_A" in i.name}
        assert sum(dims[0] for dims in stored.values()) == 2, stored


def test_peft_reads_what_was_given_up(zoo: Zoo, tmp_path: Path) -> None:
    made = zoo.adapted("adalora", "bert")
    with torch.no_grad():
        for n, p in made.module.named_parameters():
            if "lora_E" in n:
                p[1].zero_()
    made.save_adapter(tmp_path)
    twin = in_peft(zoo, tmp_path)
    tensors = inputs("bert", 2, 5)
    with torch.no_grad():
        want = outputs(twin, tensors, ["logits"], **without_cache(zoo.eager("bert")))
        close(made.module.eval()(**tensors)["logits"], want["logits"])


def test_the_allocator_needs_to_know_the_end() -> None:
    module = compiled(ADALORA).module
    with pytest.raises(adaptc.AdaptcError, match="how many `steps`"):
        adaptc.TrainingStep(module)
    with pytest.raises(adaptc.AdaptcError, match="tinit 4 and tfinal 6 leave none of 10 steps"):
        adaptc.TrainingStep(module, steps=10)


def test_the_penalty_is_the_papers_and_is_added_once() -> None:
    made = compiled(ADALORA)
    perturb(made.module)
    step = adaptc.TrainingStep(made.module, steps=24)
    state = dict(made.module.named_parameters())
    want = []
    for layer in ("up", "down"):
        A, B = (state[f"{layer}.lora_{x}.default"] for x in "AB")
        want += [(A @ A.T - torch.eye(3)).norm(), (B.T @ B - torch.eye(3)).norm()]
    penalty = 0.5 * sum(want) / 4
    close(step.penalty(), penalty)
    (gradient,) = torch.autograd.grad(penalty, state["up.lora_A.default"])
    step.before()
    close(state["up.lora_A.default"].grad, gradient)


DYLORA = {"method": "dylora", "target": ["up", "down"], "r": 3, "alpha": 6}


def test_dylora_trains_every_rank_and_is_cut_to_any(tmp_path: Path) -> None:
    made = compiled(DYLORA)
    module = made.module.train()
    step = adaptc.TrainingStep(module)
    perturb(module)
    seen = set()
    for _ in range(30):
        module(**data())["loss"].backward()
        A = module.get_parameter("up.lora_A.default.weight")
        seen.add(int((A.grad.abs().amax(1) > 0).sum()))
        A.grad = None
        step.after()
    assert seen == {1, 2, 3}
    module.eval()
    whole = module(**data())["logits"].detach()
    made.save_adapter(tmp_path)
    state = {n: p.detach() for n, p in module.named_parameters()}
    for rank in (1, 2, 3):
        cut = compiled({"adapter": str(tmp_path), "r": rank})
        got = cut.module.eval()(**data())["logits"].detach()
        weights = {}
        for layer in ("up", "down"):
            A, B = (state[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            weights[layer] = state[f"{layer}.weight"] + 6 / rank * B[:, :rank] @ A[:rank]
        hidden = torch.tanh(data()["x"] @ weights["up"].T + state["up.bias"])
        want = hidden @ weights["down"].T + state["down.bias"]
        close(got, want)
        close(cut.fold()(**data())["logits"].detach(), want)
    close(got, whole)
    with pytest.raises(adaptc.SpecError, match="ranks up to 3, got 4"):
        compiled({"adapter": str(tmp_path), "r": 4})


def test_dylora_checkpoint_is_lora_to_peft(zoo: Zoo, tmp_path: Path) -> None:
    made = zoo.adapted("dylora", "bert")
    made.save_adapter(tmp_path)
    twin = in_peft(zoo, tmp_path)
    tensors = inputs("bert", 2, 5)
    with torch.no_grad():
        close(made.module.eval()(**tensors)["logits"], twin(**tensors).logits)


def test_a_plain_adapter_is_not_cut(tmp_path: Path) -> None:
    made = compiled({"method": "lora", "target": "up", "r": 3})
    made.save_adapter(tmp_path)
    with pytest.raises(adaptc.SpecError, match="ranks of lora are not nested, as those of dylora are"):
        compiled({"adapter": str(tmp_path), "r": 2})


def test_what_dylora_draws_is_never_exported(tmp_path: Path) -> None:
    """A module whose last step drew a small rank is exported, saved and loaded at the whole one."""
    made = compiled(DYLORA)
    module = made.module.train()
    step = adaptc.TrainingStep(module)
    train(module, step, 7)
    module.train()(**data())
    made.emit("torch", tmp_path / "t")
    made.emit("onnx", tmp_path / "m.onnx", adapters="live")
    folded = made.fold()(**data())["logits"].detach()
    want = module.eval()(**data())["logits"].detach()
    close(folded, want)
    close(onnx_runner(tmp_path / "m.onnx")({"x": data()["x"]})[0], want)
    close(adaptc.load(tmp_path / "t").eval()(**data())["logits"].detach(), want)


def test_child_tuning_masks_each_steps_gradient() -> None:
    made = compiled({"method": "child-tuning", "target": "*", "reserve_p": 0.25})
    module = made.module
    step = adaptc.TrainingStep(module)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in named.values()) == sum(p.numel() for p in Net().parameters())
    masks = []
    for _ in range(40):
        module.zero_grad()
        module(**data())["loss"].backward()
        before = {n: p.grad.clone() for n, p in named.items()}
        step.before()
        kept = [(p.grad != 0) for p in named.values()]
        for (n, p), mask in zip(named.items(), kept, strict=True):
            close(p.grad, before[n] * mask / 0.25)
        masks.append(torch.cat([mask.flatten() for mask in kept]))
    share = torch.stack(masks).float()
    assert abs(float(share.mean()) - 0.25) < 0.02
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    "adapt",
    [
        {"method": "fishmask", "target": "*", "keep_ratio": 0.1},
        {"method": "child-tuning", "variant": "D", "target": "*", "reserve_p": 0.1},
    ],
    ids=lambda a: a["method"],
)
def test_entries_with_the_largest_fisher_information_of_all_are_trained(adapt: Any, tmp_path: Path) -> None:
    """Row by row, by hand; gradients and optimiser states exist for the chosen entries only."""
    net, rows = Net(), data(5, rows=9)
    sums = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for row in range(9):
        net.zero_grad()
        net(**{k: v[row : row + 1] for k, v in rows.items()})["loss"].backward()
        for n, p in net.named_parameters():
            sums[n] += p.grad.square() / 9
    flat = torch.cat([s.flatten() for s in sums.values()])
    count = round(0.1 * len(flat))
    bound = flat.sort(descending=True)[0][count - 1]
    made = compiled(
        adapt, calibration=[{k: v[:4] for k, v in rows.items()}, {k: v[4:] for k, v in rows.items()}]
    )
    module = made.module
    kind = adapt["method"].replace("-", "_")
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    places = {n: b for n, b in module.named_buffers() if "places" in n}
    for name, information in sums.items():
        layer, leaf = name.split(".")
        key = f"{layer}.{kind}_places.default.{leaf}"
        chosen = (information.flatten() >= bound).nonzero().flatten()
        assert torch.equal(places.get(key, chosen.new_zeros(0)), chosen)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for number in range(10):
        loss = module(**data(number))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(value.numel() for value in states) == 2 * count
    folded, before = made.fold().state_dict(), net.state_dict()
    changed = {name: (folded[name] != before[name]) for name in before}
    assert sum(int(c.sum()) for c in changed.values()) == count
    made.save_adapter(tmp_path)
    again = compiled({"adapter": str(tmp_path)})  # without the data
    assert torch.equal(again.module.eval()(**data())["logits"], module.eval()(**data())["logits"])


def test_loraplus_groups() -> None:
    made = compiled({"method": "lora", "target": "up", "r": 2}, {"method": "full", "target": "down"})
    groups = adaptc.parameter_groups(made.module, lr=1e-3, ratio=8)
    named = {id(p): n for n, p in made.module.named_parameters()}
    found = [(group["lr"], sorted(named[id(p)] for p in group["params"])) for group in groups]
    assert found == [
        (1e-3, ["down.full.default.bias", "down.full.default.weight", "up.lora_A.default.weight"]),
        (8e-3, ["up.lora_B.default.weight"]),
    ]
    torch.optim.AdamW(groups)


def test_peft_groups_loraplus_alike(zoo: Zoo) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(zoo.fresh("bert"), peft.LoraConfig(target_modules=["query", "value"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    wanted: dict[float, set[str]] = {}
    names = {id(p): n.replace("base_model.model.", "") for n, p in theirs.named_parameters()}
    for group in optimizer.param_groups:
        wanted.setdefault(group["lr"], set()).update(names[id(p)] for p in group["params"])
    made = zoo.compiled("bert", [{"method": "lora", "target": ["*.query", "*.value"]}])
    own = {id(p): n for n, p in made.module.named_parameters()}
    found = {g["lr"]: {own[id(p)] for p in g["params"]} for g in adaptc.parameter_groups(made.module, 1e-4)}
    assert found == {lr: group for lr, group in wanted.items() if group}


def test_methods_without_a_rule_are_left_alone() -> None:
    made = compiled({"method": "lora", "target": "up", "r": 2})
    step = adaptc.TrainingStep(made.module)
    assert step.penalty().item() == 0
    losses = train(made.module, step, 10)
    assert losses[-1] < losses[0]


def test_step_with_torch_compile() -> None:
    made = compiled(DYLORA)
    module = made.module.train()
    torch._dynamo.reset()
    fast = torch.compile(module, backend="aot_eager")
    step = adaptc.TrainingStep(fast)
    losses = train(fast, step, 12)
    assert losses[-1] < losses[0]


@pytest.mark.slow  # `tests/test_training.py` trains with a Trainer, the tests above make the steps
@pytest.mark.parametrize("method", ["adalora", "dylora", "child-tuning"])
def test_trainer_makes_the_steps(zoo: Zoo, method: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    options = {"variant": "F"} if method == "child-tuning" else {}
    adapt = [entry(method, "bert", **options)]
    given = {
        "input_ids": "int64[batch, seq]",
        "attention_mask": "int64[batch, seq]",
        "labels": "int64[batch]",
    }
    made = adaptc.compile({"base": zoo.base_of("bert"), "inputs": given, "adapt": adapt})
    rows = [
        {**{k: v[0] for k, v in inputs("bert", 1, 6, seed=i).items()}, "labels": torch.tensor(i % 2)}
        for i in range(16)
    ]
    step = adaptc.TrainingStep(made.module, steps=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(made.module, arguments, train_dataset=rows, callbacks=[step.callback()]).train()
    assert step.number == 8
    if method == "adalora":
        left = sum(int((p != 0).sum()) for n, p in made.module.named_parameters() if "lora_E" in n)
        sites = sum("lora_E" in n for n, _ in made.module.named_parameters())
        assert left == 2 * sites
