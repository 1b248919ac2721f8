"""P-tuning: virtual tokens that a small network makes, at any positions among the embedded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.virtual_tokens import LAYER_SIZES, PROMPT_KEY, InputFormat, InputMethod

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import InputSite

Encoder = Annotated[
    Literal["MLP", "LSTM", "none"],
    Field(description="the network that makes the tokens while they are trained"),
]
Width = Annotated[int | None, Field(gt=0, description="width of that network; d if left out")]
Layers = Annotated[int, Field(gt=0, description="layers of the LSTM")]


class PTuningFormat(InputFormat):
    """PEFT's configuration of P-tuning."""

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """Without a network: PEFT stores P."""
        return super().read(options) | {"encoder_reparameterization_type": "none"}

    def write(self, options: dict[str, Any]) -> dict[str, Any]:
        """With a network: PEFT has no P without one, but takes a stored P as it is."""
        return options | {"encoder_reparameterization_type": "MLP"}


@method("p-tuning")
@dataclass(frozen=True)
class PTuning(InputMethod):
    """X' = [X_before; P; X_after]    P = MLP(E) or MLP(LSTM(E))    E (n, d)    Liu et al. 2021 (P-tuning), section 3.2

    MLP: `W_3 relu(W_2 relu(W_1 E + b_1) + b_2) + b_3`, of width h. After the LSTM, of h features in each direction,
    `W_2 relu(W_1 [→; ←] + b_1) + b_2`, of width 2 h. The network is dropped after training: checkpoints and
    folded models hold P `(n, d)`.
    """

    encoder_reparameterization_type: Encoder = "MLP"
    encoder_hidden_size: Width = None
    encoder_num_layers: Layers = 2

    small = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}
    while_training = frozenset({"encoder_hidden_size", "encoder_num_layers"})
    peft = PTuningFormat.of(
        "P_TUNING",
        unused=LAYER_SIZES,
        encoder_reparameterization_type="encoder_reparameterization_type",
        encoder_hidden_size="encoder_hidden_size",
        encoder_num_layers="encoder_num_layers",
    )

    @property
    def plain(self) -> Self:
        """P without a network."""
        given = self.encoder_reparameterization_type != "none"
        return replace(self, encoder_reparameterization_type="none") if given else self

    def shared(self, sites: Sequence[InputSite]) -> dict[str, Param]:
        """E and the network, or P."""
        n, d = self.num_virtual_tokens * self.num_transformer_submodules, sites[0].width
        h, encoder = self.encoder_hidden_size or d, self.encoder_reparameterization_type
        if encoder == "none":
            return {"tokens": Param((n, d), "standard-normal", PROMPT_KEY)}
        params = {"tokens": Param((n, d), "standard-normal", "prompt_inputs")}
        sizes = [d, h, h, d] if encoder == "MLP" else [2 * h, 2 * h, d]
        if encoder == "LSTM":
            for layer in range(self.encoder_num_layers):
                inner = 2 * h if layer else d
                for direction in ("forward", "backward"):
                    params |= _affine(f"lstm_{layer}_{direction}_x", 4 * h, inner) | _affine(
                        f"lstm_{layer}_{direction}_h", 4 * h, h
                    )
        for number, (inner, outer) in enumerate(pairwise(sizes)):
            params |= _affine(f"mlp_{number}", outer, inner)
        return params

    def tokens(self, **theta: Tensor) -> Tensor:
        """P `(n, d)`."""
        x, encoder = theta["tokens"], self.encoder_reparameterization_type
        if encoder == "none":
            return x
        if encoder == "LSTM":
            for layer in range(self.encoder_num_layers):
                x = _both_ways(x, theta, layer)
        last = 2 if encoder == "MLP" else 1
        for number in range(last + 1):
            x = _apply(x, theta, f"mlp_{number}")
            x = x.relu() if number < last else x
        return x


def _affine(name: str, outer: int, inner: int) -> dict[str, Param]:
    """W `(outer, inner)` under a name, and its bias `(outer,)`."""
    return {
        name: Param((outer, inner), "kaiming-uniform", f"prompt_{name}.weight"),
        f"{name}_bias": Param((outer,), "zeros", f"prompt_{name}.bias"),
    }


def _apply(x: Tensor, theta: Mapping[str, Tensor], name: str) -> Tensor:
    """`W x + b` of what `_affine` names."""
    return x @ theta[name].T + theta[f"{name}_bias"]


def _both_ways(x: Tensor, theta: Mapping[str, Tensor], layer: int) -> Tensor:
    """One layer of the LSTM in both directions: x `(n, in)` to `(n, 2 h)`."""
    from torch import cat

    forward = _lstm(x, theta, f"lstm_{layer}_forward")
    backward = _lstm(x.flip(0), theta, f"lstm_{layer}_backward").flip(0)
    return cat([forward, backward], -1)


def _lstm(x: Tensor, theta: Mapping[str, Tensor], name: str) -> Tensor:
    """`c' = σ(f) c + σ(i) tanh(g)`, `h' = σ(o) tanh(c')`, (i, f, g, o) = W x + b + U h + u; x `(n, in)` to `(n, h)`."""
    from torch import split, stack

    size = theta[f"{name}_h"].shape[1]
    h = c = x.new_zeros(size)
    outputs: list[Tensor] = []
    for row in _apply(x, theta, f"{name}_x"):
        i, f, g, o = split(row + _apply(h, theta, f"{name}_h"), size)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return stack(outputs)
