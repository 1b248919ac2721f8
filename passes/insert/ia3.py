"""(IA)³: infused adapter by inhibiting and amplifying inner activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from adaptc.errors import Fault
from adaptc.methods.method import Patterns, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, PeftFormat
from adaptc.methods.site import ATTENTION, MATRIX_KINDS, WeightSite
from adaptc.patterns import matches_any

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import Place


class Ia3Format(PeftFormat["Ia3"]):
    """PEFT's configuration of IA3."""

    def covers(self, method: Ia3, site: Place) -> bool:
        """PEFT scales the inputs or outputs of linear layers and of 2-D and 3-D convolutions."""
        assert isinstance(site, WeightSite)
        scaled = site.kind == "linear" or site.op in ("conv2d", "conv3d")
        return scaled and site.leaf == "weight" and site.type != ATTENTION


@method("ia3")
@dataclass(frozen=True)
class Ia3(WeightMethod):
    """W' = l W,  b' = l b  (keys, values)   or   W' = W l  (input of a feed-forward)     l (out, 1) or (1, in)

    Liu et al. 2022, section 3.3. Sites named by `feedforward` scale their input, all others their output,
    bias included, as in PEFT. l starts at one. The rows of a grouped convolution scale the channels of their group.
    """

    feedforward: Patterns = ()

    kinds = MATRIX_KINDS - {"embedding"}
    aliases = {"feedforward_modules": "feedforward"}
    peft = Ia3Format(
        type="IA3",
        options={"feedforward": "feedforward_modules"},
        modules=frozenset({"feedforward"}),
        neutral={"init_ia3_weights": STARTS},
    )

    def at(self, site: WeightSite) -> Self:
        """Feed-forward or not, decided once for the site."""
        return replace(self, feedforward=("*",) if matches_any(self.feedforward, site.module) else ())

    def refuses(self, site: WeightSite) -> Fault | None:
        """A grouped transposed convolution's rows are not its outputs."""
        if site.rows_repeat:
            return Fault(
                ("feedforward",) if self.feedforward else (),
                "a grouped transposed convolution's weight has no such scale",
            )
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """l, all ones; a convolution has one for each channel: (1, channels, 1, 1)."""
        shape = (1, site.in_features) if self.feedforward else (site.out_features, 1)
        if site.kind != "conv":
            return {"l": Param(shape, "ones", "ia3_l")}
        kernel = site.inner_shape[1:]
        inner, groups = site.inner_shape[0], site.groups
        channels = inner * groups if self.feedforward else site.out_features
        ones = (1,) * len(kernel)

        def unpack(l: Tensor) -> Tensor:  # noqa: E741
            if not self.feedforward:
                return l.reshape(shape)
            if groups == 1:
                return l.expand(1, channels, *kernel).reshape(shape)
            rows = site.out_features // groups  # of each group, which has its own input channels
            scales = l.reshape(groups, 1, inner, *ones).expand(groups, rows, inner, *kernel)
            return scales.reshape(site.out_features, site.in_features)

        return {"l": Param((1, channels, *ones), "ones", "ia3_l", unpack)}

    def weight(self, W: Tensor, *, l: Tensor) -> Tensor:  # noqa: E741 (the paper's name)
        """W with its columns (feed-forward) or rows scaled by l, of shape (out, in)."""
        return W * l

    def bias(self, b: Tensor, *, l: Tensor) -> Tensor:  # noqa: E741
        """The bias scaled with the output, of shape (out,)."""
        return b if self.feedforward else b * l.squeeze(1)
