"""The keys that PEFT gives the tensors of an adapter: its modules may be nested in one another."""

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
        order: name of a weight -> its position in the model.
    """

    sites: Sequence[Site]
    order: Mapping[str, int]

    def key(self, site: Site, param: Param) -> str:
        """The key of a tensor, without PEFT's prefix."""
        if not isinstance(site, WeightSite) or site.kind not in MATRIX_KINDS:
            return f"{self._nested(site.module)}{'base_layer.' * self._wraps(site.module)}{param.key}"
        inside = [s for s in self._parameters(site.module) if self._position(s) > self._position(site)]
        return f"{self._nested(site.module)}{'base_layer.' * len(inside)}{param.key}"

    @property
    def modules(self) -> list[str]:
        """The names for `target_modules`."""
        sites = [s for s in self._matrices() if not s.by_parameter and not self._whole_attention(s)]
        return list(dict.fromkeys(site.module for site in sites))

    @property
    def parameters(self) -> list[str]:
        """The names for `target_parameters`."""
        return [f"{site.module}.{site.leaf}" for site in self._matrices() if site.by_parameter]

    @property
    def supported(self) -> bool:
        """Whether PEFT can adapt exactly these sites: of an attention module both projections, or neither."""
        attentions = {site.module for site in self._matrices() if site.leaf == IN_PROJECTION}
        inner = {
            site.module.removesuffix(OUT_PROJECTION) for site in self._matrices() if self._is_inner(site)
        }
        return attentions == inner

    def _matrices(self) -> list[WeightSite]:
        return [site for site in self.sites if isinstance(site, WeightSite) and site.kind in MATRIX_KINDS]

    def _parameters(self, module: str) -> list[WeightSite]:
        return [site for site in self._matrices() if site.module == module and site.by_parameter]

    def _position(self, site: WeightSite) -> int:
        return self.order[site.parameter]

    def _is_inner(self, site: WeightSite) -> bool:
        return site.type == ATTENTION and site.module.endswith(OUT_PROJECTION)

    def _whole_attention(self, site: WeightSite) -> str:
        """The attention module that this output projection is adapted with; "" for any other site."""
        module = site.module.removesuffix(OUT_PROJECTION)
        projected = any(
            isinstance(s, WeightSite) and s.module == module and s.leaf == IN_PROJECTION for s in self.sites
        )
        return module if projected and self._is_inner(site) else ""

    def _wraps(self, module: str) -> int:
        """How often PEFT wraps a module: once, or once for each parameter of it that is targeted."""
        adapted = any(site.module == module for site in self._matrices())
        return len(self._parameters(module)) or int(adapted)

    def _nested(self, module: str) -> str:
        """A module's name with a dot at its end; `base_layer` follows every module around it that PEFT wraps."""
        parts = module.split(".") if module else []
        name = ""
        for end, part in enumerate(parts, 1):
            wrapped = "" if end == len(parts) else "base_layer." * self._wraps(".".join(parts[:end]))
            name += f"{part}.{wrapped}"
        return name
