"""Torch's own products with packed weights: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.passes.lower import torch_kernels as kernels
from tests.families import Zoo, close, entry, inputs, matrix, randomise


@pytest.mark.parametrize(
    "options", [{"method": "int4"}, {"method": "int4", "symmetric": True}, {"method": "int8"}]
)
def test_torch_kernels(options: dict[str, Any]) -> None:
    """Torch's products with packed weights are those with the weights, to bfloat16's own error."""
    model = (
        randomise(nn.Sequential(nn.Linear(128, 48), nn.Tanh(), nn.Linear(48, 64, bias=False)))
        .bfloat16()
        .eval()
    )
    x = matrix(3, 128).bfloat16().unsqueeze(0)
    block = {"block_size": 32} if options["method"] == "int4" else {}
    made = adaptc.compile(
        {"quantize": [{**options, **block, "target": "*"}]},
        model=model,
        example_inputs=(x,),
        dynamic={"input": {0: "batch", 1: "seq"}},
    )
    plain, fast = made.fold(), made.inference(tokens=1)
    kernels = [str(n.target) for n in fast.graph.nodes if "pack_mm" in str(n.target)]
    assert len(kernels) == (1 if options["method"] == "int4" else 2), "48 columns are no whole blocks of 32"
    with torch.no_grad():
        close(fast(x), plain(x), epsilons=8)
        close(fast(x[:, :1]), plain(x[:, :1]), epsilons=8)
    assert not [n for n in made.inference(tokens=64).graph.nodes if "pack_mm" in str(n.target)]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# the kernels of a GPU


def quantized(options: dict[str, Any]) -> tuple[Compiled, torch.Tensor]:
    """Two layers; the second has no bias."""
    layers = nn.Linear(128, 48), nn.Tanh(), nn.Linear(48, 64, bias=False)
    model = randomise(nn.Sequential(*layers)).bfloat16()
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    return compiled(model, x, options), x


KERNELS = [
    pytest.param({"method": "int4", "block_size": 16}, "none", id="no kernel takes blocks of 16"),
    pytest.param({"method": "int4", "block_size": 32}, "_weight_int4pack_mm", id="int4"),
    pytest.param(
        {"method": "int4", "block_size": 32, "symmetric": True}, "_weight_int4pack_mm", id="symmetric"
    ),
    pytest.param({"method": "int8"}, "none", id="int8"),
    pytest.param({"method": "nf4", "block_size": 32}, "gemm_4bit", id="nf4"),
    pytest.param({"method": "nf4", "block_size": 32, "double": True}, "gemm_4bit", id="nf4 double"),
    pytest.param({"method": "fp4", "block_size": 32}, "gemm_4bit", id="fp4"),
]


class First(nn.Module):
    """The first token by itself, as a pooler reads it: no contiguous rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layer(input[:, 0])


def compiled(model: nn.Module, x: torch.Tensor, options: dict[str, Any]) -> Compiled:
    return adaptc.compile(
        {"quantize": [{**options, "target": "*"}]},
        model=model.eval(),
        example_inputs=(x,),
        dynamic={"input": {0: "batch", 1: "seq"}},
    )


def check(made: Compiled, x: torch.Tensor, kernel: str, device: str) -> None:
    fast, plain = made.inference(device=device), made.fold()
    found = [
        str(n.target) for n in fast.graph.nodes if "4pack_mm" in str(n.target) or "gemm" in str(n.target)
    ]
    assert [kernel in target for target in found] == ([] if kernel == "none" else [True])
    assert len(fast.state_dict()) <= len(plain.state_dict()), "a kernel's own copy is the only one"
    with torch.no_grad():
        for given in (x, x[:, :1], x.expand(5, -1, -1)):
            close(fast(given.to(device)).cpu(), plain(given), epsilons=8)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The graph for a GPU on the CPU: tensor cores' kernels played as int4mm.cu describes them, in other tiles."""
    library = torch.library.Library("aten", "IMPL")

    def convert(codes: torch.Tensor, tiles: int) -> torch.Tensor:
        assert codes.dtype == torch.uint8
        rows, columns = codes.shape[0], codes.shape[1] * 2
        return codes.view(torch.int32).reshape(rows // 8, columns // (16 * tiles), 32, tiles // 2)

    def product(x: torch.Tensor, tiles: torch.Tensor, block: int, ranges: torch.Tensor) -> torch.Tensor:
        assert x.dtype == ranges.dtype == torch.bfloat16
        assert x.is_contiguous()
        packed = tiles.reshape(ranges.shape[1], -1).view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1).float()
        scales, middles = ranges.float().transpose(0, 1).repeat_interleave(block, 1).unbind(-1)
        return (x.float() @ ((codes - 8) * scales + middles).T).bfloat16()

    library.impl("_convert_weight_to_int4pack", convert, "CPU")
    library.impl("_weight_int4pack_mm", product, "CPU")
    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.KERNELS["cuda"])
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: True)
    yield
    library._destroy()


@pytest.mark.parametrize(("options", "kernel"), KERNELS)
def test_the_graph_for_a_gpu(played: Any, options: dict[str, Any], kernel: str) -> None:
    if kernel == "gemm_4bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check(*quantized(options), kernel, "cpu")


@pytest.mark.parametrize("method", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tables", ["a CPU's", "a GPU's"])
def test_rows_that_do_not_lie_side_by_side(
    request: pytest.FixtureRequest, tables: str, dtype: torch.dtype, method: str
) -> None:
    """Whatever the dtype, the module runs: where no kernel takes it, the plain way."""
    if tables == "a GPU's":
        request.getfixturevalue("played")
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    block = {} if method == "int8" else {"block_size": 32}
    made = compiled(randomise(First()).to(dtype), x, {"method": method, **block})
    with torch.no_grad():
        close(made.inference()(x), made.fold()(x), epsilons=8)


@GPU
@pytest.mark.parametrize(("options", "kernel"), KERNELS)
def test_on_a_gpu(options: dict[str, Any], kernel: str) -> None:
    if kernel == "gemm_4bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check(*quantized(options), kernel, "cuda")


@GPU
@pytest.mark.parametrize("method", ["lora", "oft", "dora"])
def test_training_on_a_gpu_comes_back(zoo: Zoo, method: str, tmp_path: Any) -> None:
    """What was trained there is folded and saved here."""
    made = zoo.compiled("llama", [entry(method, "llama")])
    module, given = made.module.cuda().train(), {n: t.cuda() for n, t in inputs("llama").items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module(**given)["logits"].square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        live = module.eval()(**given)["logits"].cpu()
        close(made.fold()(**inputs("llama"))["logits"], live)
    made.save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("device", ["nowhere", "hpu", "cuda:99", None])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    made, _ = quantized({"method": "int8"})
    with pytest.raises(adaptc.AdaptcError) as caught:
        made.inference(device=device)
    assert [proof.name for proof in made.proofs] == ["trace"], "nothing is folded before"
    text = str(caught.value)
    assert f"device: torch does not reach {device!r} here" in text
    assert "expected one such as 'cpu' or 'cuda'" in text
