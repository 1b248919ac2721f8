"""RoAd: rotation adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Variant = Literal["road_1", "road_2", "road_4"]
Group = Annotated[
    int, Field(gt=0, multiple_of=2, description="outputs in a group: each is paired half a group on")
]


@method("road")
@dataclass(frozen=True)
class Road(WeightMethod):
    """W' = R W,  b' = R b,  R rotates pairs of outputs: [a cos t, -a sin t; a sin t, a cos t]        t, a (out / 2,)

    Liao et al. 2024, equation 3. Each pair has one angle t and scale a (road_1), each output its own (road_2:
    (out,)), or each entry of the four (road_4: (2 out,)). Pairs lie half a `group_size` apart, as in PEFT. t starts
    at zero, a at one.
    """

    variant: Annotated[
        Variant,
        Field(description="an angle and a scale for each pair, for each output, or four numbers"),
    ] = "road_1"
    group_size: Group = 64

    kinds = MATRIX_KINDS
    small = {"group_size": 2}
    peft = PeftFormat(
        "ROAD",
        options={"variant": "variant", "group_size": "group_size"},
        layers=frozenset({"Linear"}),
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """`group_size` must divide the outputs."""
        if site.rows_repeat:
            return Fault((), "a grouped transposed convolution's rows are not its outputs")
        if site.out_features % self.group_size:
            return Fault(
                ("group_size",), f"group_size must divide {site.out_features}, got {self.group_size}"
            )
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """t zero and a one, of (out / 2,), (out,) or (2 out,)."""
        shape = (site.out_features * {"road_1": 1, "road_2": 2, "road_4": 4}[self.variant] // 2,)
        keys: Mapping[str, str] = {"t": "road_theta", "a": "road_alpha"}
        return {"t": Param(shape, "zeros", keys["t"]), "a": Param(shape, "ones", keys["a"])}

    def weight(self, W: Tensor, *, t: Tensor, a: Tensor) -> Tensor:
        """R W, of shape (out, in)."""
        cosines, sines = self._scaled(t, a)
        first, second = unflatten(W, 0, (-1, 2, self.group_size // 2)).unbind(1)
        return cosines.unsqueeze(1) * W + sines.unsqueeze(1) * _stack(-second, first).flatten(0, 2)

    def bias(self, b: Tensor, *, t: Tensor, a: Tensor) -> Tensor:
        """R b, of shape (out,)."""
        return self.weight(b.unsqueeze(1), t=t, a=a).squeeze(1)

    def _scaled(self, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a cos t of each output, and a sin t of its partner: (out,) each."""
        if self.variant == "road_4":
            angles, scales = (unflatten(v, 0, (-1, 2, self.group_size)) for v in (t, a))
            return (scales[:, 0] * angles[:, 0].cos()).flatten(), (
                scales[:, 1] * angles[:, 1].sin()
            ).flatten()
        if self.variant == "road_1":
            pairs = [unflatten(v, 0, (-1, self.group_size // 2)) for v in (t, a)]
            t, a = (_stack(v, v).flatten() for v in pairs)
        return a * t.cos(), a * t.sin()


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors along a new axis 1."""
    import torch

    return torch.stack([first, second], dim=1)
