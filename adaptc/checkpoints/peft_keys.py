"""What PEFT calls the tensors of an adapter, where its modules stand inside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptc.methods.param import Param
from adaptc.methods.point_sites import Site
from adaptc.methods.site import ATTENTION, IN_PROJECTION, MATRIX_KINDS, OUT_PROJECTION, WeightSite


@dataclass(frozen=True)
class PeftLayout:
    """The sites that one checkpoint covers, and how PEFT nests their modules.

    PEFT wraps what it adapts: the wrapped module is then called `base_layer`. It targets a parameter that is no
    module's `weight` by the parameter's name (`target_parameters`), and wraps its module once for each of them.

    Attributes:
        sites: all sites of the checkpoint, in any order.
        order: every weight's place in the model.
    """

    sites: Sequence[Site]
    order: Mapping[str, int]

    def key(self, site: Site, param: Param) -> str:
        """The key of a tensor, without PEFT's prefix."""
        if not isinstance(site, WeightSite) or site.kind not in MATRIX_KINDS:
            return f"{self._nested(site.module)}{'base_layer.' * self._wraps(site.module)}{param.key}"
        inside = [s for s in self._parameters(site.module) if self._place(s) > self._place(site)]
        return f"{self._nested(site.module)}{'base_layer.' * len(inside)}{param.key}"

    @property
    def modules(self) -> list[str]:
        """What goes into `target_modules`."""
        kept = [s for s in self._matrices() if not s.by_parameter and not self._whole_attention(s)]
        return list(dict.fromkeys(site.module for site in kept))

    @property
    def parameters(self) -> list[str]:
        """What goes into `target_parameters`."""
        return [f"{site.module}.{site.leaf}" for site in self._matrices() if site.by_parameter]

    @property
    def known(self) -> bool:
        """Whether PEFT can adapt exactly these sites: of an attention module both weights, or none."""
        packed = {site.module for site in self._matrices() if site.leaf == IN_PROJECTION}
        inner = {
            site.module.removesuffix(OUT_PROJECTION) for site in self._matrices() if self._is_inner(site)
        }
        return packed == inner

    def _matrices(self) -> list[WeightSite]:
        return [site for site in self.sites if isinstance(site, WeightSite) and site.kind in MATRIX_KINDS]

    def _parameters(self, module: str) -> list[WeightSite]:
        return [site for site in self._matrices() if site.module == module and site.by_parameter]

    def _place(self, site: WeightSite) -> int:
        return self.order[site.parameter]

    def _is_inner(self, site: WeightSite) -> bool:
        return site.type == ATTENTION and site.module.endswith(OUT_PROJECTION)

    def _whole_attention(self, site: WeightSite) -> str:
        """The attention module that this output projection is adapted with; "" if it is none."""
        module = site.module.removesuffix(OUT_PROJECTION)
        packed = any(
            isinstance(s, WeightSite) and s.module == module and s.leaf == IN_PROJECTION for s in self.sites
        )
        return module if packed and self._is_inner(site) else ""

    def _wraps(self, module: str) -> int:
        """How often PEFT wraps a module: once, or once for each parameter of it that is targeted."""
        own = [site for site in self._matrices() if site.module == module]
        return len(self._parameters(module)) or min(1, len(own))

    def _nested(self, module: str) -> str:
        """A module's name with a dot, `base_layer` put in wherever a module around it is wrapped."""
        parts = module.split(".") if module else []
        name = ""
        for end, part in enumerate(parts, 1):
            around = "" if end == len(parts) else "base_layer." * self._wraps(".".join(parts[:end]))
            name += f"{part}.{around}"
        return name
