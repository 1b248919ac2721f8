"""What torch.export refuses or fixes is told at the author's line, with the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)


class Length(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x) + torch.zeros(len(x), 4)  # Length


class Rows(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.l(row) for row in x])  # Rows


class Integer(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x).reshape(int(x.shape[0]), 2, 2)  # Integer


class Data(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x.data)  # Data


class Inference(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            y = x * 2
        return self.l(y)  # Inference


class Generated(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x) + torch.rand(4, generator=torch.Generator())  # Generated


class Conditional(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.while_loop(lambda y: y.sum() > 0, lambda y: (y - 1,), (self.l(x),))[0]  # Conditional


class Mapped(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(self.l)(x)  # Mapped


class Random(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x) + torch.rand(4)  # Random


CASES = {
    Length: "write x.shape[0] in place of len(x)",
    Rows: "a loop runs as often as when it was traced",
    Integer: "use the size itself, without int()",
    Data: "write x.detach() in place of x.data",
    Inference: "write torch.no_grad() in place of torch.inference_mode()",
    Generated: "draw random numbers before the model is called",
    Conditional: "let torch.where keep each value once it is done",
    Mapped: "write it without torch.vmap",
    Random: "expected a model that is random in training only",
}


def refusal(model: nn.Module) -> str:
    with pytest.raises(AdaptcError) as error:
        adaptc.compile(
            {"adapt": [{"method": "lora", "target": "l", "r": 2}]},
            model=model.eval(),
            example_inputs=(torch.randn(3, 4),),
            dynamic={"x": {0: "batch"}},
        )
    return str(error.value)


@pytest.mark.parametrize("kind", CASES)
def test_the_line_and_the_mend(kind: type[nn.Module]) -> None:
    text, source = refusal(kind()), Path(__file__).read_text().splitlines()
    line = next(number for number, shown in enumerate(source, 1) if shown.endswith(f"# {kind.__name__}"))
    assert f"test_author_lines.py:{line}" in text
    assert CASES[kind] in text


def test_a_lazy_layer_is_named() -> None:
    model = Length()
    model.l = nn.LazyLinear(4)
    text = refusal(model)
    assert "l (LazyLinear) has no weight yet" in text
    assert "run the model once" in text
