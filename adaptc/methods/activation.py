"""Methods that add to a sub-layer's output, and the small feed-forward that most of them add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from adaptc.errors import Fault, did_you_mean
from adaptc.methods.method import Dropout, Method
from adaptc.methods.param import Param
from adaptc.methods.point_sites import SubLayer
from adaptc.methods.site import SUBLAYER

if TYPE_CHECKING:
    from torch import Tensor

Width = Annotated[int, Field(gt=0, description="width of the bottleneck")]
Activation = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$", description="a function of torch.nn.functional, such as gelu")
]
Scale = Annotated[float, Field(gt=0, description="what the adapter's output is multiplied by")]
Start = Annotated[
    Literal["zero", "normal"],
    Field(
        description="zero: W_up is zero, so it starts as the base; normal: nearly so, both drawn from N(0, 0.02)"
    ),
]
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "mish", "leaky_relu", "elu", "hardswish")
"""Some of torch's activations, which messages list."""


class ActivationMethod(Method[SubLayer]):
    """A method that adds to a sub-layer's output: `h' = h + f(z)`, before the residual sum.

    h `(..., d)` is the output of an attention or a feed-forward. z is h, or with `reads = "input"` the sub-layer's
    input x, which its first matrix product reads. An option named `dropout` acts on z in training.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"branch": ("z",)}
    sits_on = frozenset({SUBLAYER})
    kinds = sits_on
    everywhere = True
    reads: ClassVar[str] = "output"
    """What z is: the sub-layer's `output`, or its `input`."""
    dropout: float = 0.0

    def branch(self, z: Tensor, *_: Any, **theta: Any) -> Tensor:
        """f(z), of z's shape and dtype, from z and the tensors of `params` and `shared`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SmallFeedForward(ActivationMethod):
    """The options and maths of `f(z) = s (W_up σ(W_down z + b_down) + b_up)`, W_down `(r, d)`, W_up `(d, r)`."""

    r: Width = 16
    activation: Activation = "relu"
    scale: Scale = 1.0
    dropout: Dropout = 0.0
    init_weights: Start = "zero"

    aliases: ClassVar[Mapping[str, str]] = {"non_linearity": "activation", "scaling": "scale"}
    small: ClassVar[Mapping[str, object]] = {"r": 4, "activation": "gelu"}
    fast = frozenset({"up"})

    def refuses(self, site: SubLayer) -> Fault | None:
        """The activation must be a function of one tensor in torch.nn.functional."""
        from torch import ones
        from torch.nn import functional

        function = getattr(functional, self.activation, None)
        hint = did_you_mean(self.activation, ACTIVATIONS) or ":"
        reason = f"torch.nn.functional has no activation {self.activation!r}{hint} such are {', '.join(ACTIVATIONS)}"
        try:
            usable = function is not None and function(ones(2, 2)).shape == (2, 2)
        except (TypeError, ValueError, RuntimeError):
            usable = False
        return None if usable else Fault(("activation",), reason)

    def refuses_to_train(self, site: SubLayer) -> Fault | None:
        """A bottleneck must not be wider than the features of the sub-layer."""
        if site.width is None or self.r <= site.width:
            return None
        return Fault(("r",), f"r={self.r} is wider than the {site.width} features here")

    def params(self, site: SubLayer) -> dict[str, Param]:
        """W_down `(r, d)` and W_up `(d, r)`, and their biases `(r,)` and `(d,)`."""
        (d,), key = site.shape, self.name.replace("-", "_")
        zero = self.init_weights == "zero"
        return {
            "down": Param((self.r, d), "kaiming-uniform" if zero else "normal", f"{key}_down.weight"),
            "down_bias": Param((self.r,), "zeros", f"{key}_down.bias"),
            "up": Param((d, self.r), "zeros" if zero else "normal", f"{key}_up.weight"),
            "up_bias": Param((d,), "zeros", f"{key}_up.bias"),
        }

    def activated(self, x: Tensor) -> Tensor:
        """σ(x), of x's shape: the function of torch that `activation` names."""
        from torch.nn import functional

        function: Any = getattr(functional, self.activation)
        return function(x)

    def branch(self, z: Tensor, **theta: Tensor) -> Tensor:
        """`s (W_up σ(W_down z + b_down) + b_up)`, of z's shape `(..., d)`."""
        from torch.nn.functional import linear

        narrow = self.activated(linear(z, theta["down"], theta["down_bias"]))
        return self.scale * linear(narrow, theta["up"], theta["up_bias"])
