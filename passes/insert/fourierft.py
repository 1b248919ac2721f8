"""FourierFT: fine-tuning of a few frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import LayerKey, PeftFormat, of_pattern
from adaptc.methods.site import MATRIX_KINDS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(gt=0, description="how many frequencies are trained")]
Pattern = Annotated[Mapping[LayerKey, Count], Field(description="layer -> its own n_frequency")]


@method("fourierft")
@dataclass(frozen=True)
class FourierFT(WeightMethod):
    """W' = W + scaling Re(F⁻¹(C))        C (out, in) with n entries c (n,), all others zero

    Gao et al. 2024, equations 2 to 4: F⁻¹ is the inverse 2-D Fourier transform. The positions of the
    entries are drawn from `random_loc_seed`, the same for all layers of a size. c starts standard normal, so that the
    model does not start as its base.
    """

    n_frequency: Count = 1000
    scaling: Annotated[float, Field(description="what the change is multiplied by")] = 150.0
    random_loc_seed: Annotated[int, Field(description="seed of the places of the frequencies")] = 777
    n_frequency_pattern: Pattern = field(default_factory=dict[str, Count])

    kinds = MATRIX_KINDS
    small = {"n_frequency": 9}
    identity_at_init = False
    peft = PeftFormat(
        "FOURIERFT",
        options={name: name for name in ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern")},
    )

    def at(self, site: WeightSite) -> Self:
        """The number of frequencies of this site."""
        n = of_pattern(self.n_frequency_pattern, site, self.n_frequency)
        return replace(super().at(site), n_frequency=n, n_frequency_pattern={})

    def refuses(self, site: WeightSite) -> Fault | None:
        """No more frequencies than the weight has entries."""
        most, n = site.out_features * site.in_features, self.at(site).n_frequency
        return (
            None
            if n <= most
            else Fault(("n_frequency",), f"n_frequency must be at most {most} here, got {n}")
        )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """c (n,) standard normal, and the entries' positions in C, row after row."""
        n, size = self.n_frequency, site.out_features * site.in_features

        def positions(_: Tensor, __: Generator) -> Tensor:
            import torch

            return torch.randperm(size, generator=torch.Generator().manual_seed(self.random_loc_seed))[:n]

        return {
            "c": Param((n,), "standard-normal", "fourierft_spectrum"),
            "at": Param((n,), positions, "fourierft_locations", trained=False, stored=False, below=size),
        }

    def weight(self, W: Tensor, *, c: Tensor, at: Tensor) -> Tensor:
        """W + scaling Re(F⁻¹(C)), of shape (out, in)."""
        import torch

        C = W.new_zeros(W.numel()).scatter(0, at, c).view(W.shape)
        # Torch has no transform of 16-bit numbers.
        wide = C.float() if C.dtype.itemsize == 2 else C
        fft: Any = torch.fft
        change: Tensor = fft.ifft2(wide).real.to(W.dtype)
        return W + self.scaling * change
