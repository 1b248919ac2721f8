"""What a program says of its own slots, as JSON in its metadata: enough to make one more adapter for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adaptc.methods.point_sites import AttentionSite, Heads
from adaptc.methods.site import Layout, Use, WeightSite
from adaptc.rewriter.swap.prefix import PrefixSlot
from adaptc.rewriter.swap.slots import Slot, Slots

KEY = "adaptc.swap"
"""The key in a program's metadata."""


@dataclass(frozen=True)
class Parameter:
    """A tensor of the base that an adapter may replace.

    Attributes:
        site: the tensor as a site of methods that train it whole.
        dtype: its dtype.
    """

    site: WeightSite
    dtype: torch.dtype


@dataclass(frozen=True)
class SlotRecord:
    """The slots of a program.

    Attributes:
        base_sha256: the hash of its base.
        slots: the slots.
        parameters: the tensors that may be replaced whole, by name.
        pieces: name of a site -> name of a slice of its weight -> the rows of the slice.
        modules: the names of the base's modules.
        order: the names of the base's weights, in the model's order.
    """

    base_sha256: str
    slots: Slots
    parameters: Mapping[str, Parameter]
    pieces: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]]
    modules: tuple[str, ...]
    order: tuple[str, ...]

    def to_json(self) -> str:
        """The record as text."""
        slots = [
            {"site": site_json(s.site), "rows": s.rows, "columns": s.columns, "rank": s.rank}
            for s in self.slots.weights.values()
        ]
        parameters = {
            name: site_json(p.site) | {"of": _dtype(p.dtype)} for name, p in self.parameters.items()
        }
        fields = {"base_sha256": self.base_sha256, "slots": slots, "parameters": parameters}
        if self.slots.prefix is not None:
            fields["virtual_tokens"] = prefix_json(self.slots.prefix)
        return json.dumps(fields | {"pieces": self.pieces, "modules": self.modules, "order": self.order})

    @classmethod
    def from_json(cls, text: str) -> SlotRecord:
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        slots = [
            Slot(site_from_json(slot["site"]), slot["rows"], slot["columns"], slot["rank"])
            for slot in data["slots"]
        ]
        parameters = {
            name: Parameter(site_from_json(site), getattr(torch, site["of"]))
            for name, site in data["parameters"].items()
        }
        pieces = {
            site: {name: _ranges(rows) for name, rows in pieces.items()}
            for site, pieces in data["pieces"].items()
        }
        prefix = prefix_from_json(data["virtual_tokens"]) if "virtual_tokens" in data else None
        held = Slots({slot.site.name: slot for slot in slots}, tuple(parameters), prefix)
        return cls(
            data["base_sha256"], held, parameters, pieces, tuple(data["modules"]), tuple(data["order"])
        )


def prefix_json(prefix: PrefixSlot) -> dict[str, Any]:
    """The place of a prefix as plain data."""
    sites = [asdict(replace(site, dtype=_dtype(site.dtype))) for site in prefix.sites]  # type: ignore[arg-type]
    return {"sites": sites, "submodules": prefix.submodules, "dtype": _dtype(prefix.dtype)}


def prefix_from_json(data: Mapping[str, Any]) -> PrefixSlot:
    """Read what `prefix_json` wrote."""
    sites = tuple(
        AttentionSite(
            **site
            | {
                "uses": tuple(Use(**use) for use in site["uses"]),
                "heads": Heads(**site["heads"]),
                "dtype": getattr(torch, site["dtype"]),
            }
        )
        for site in data["sites"]
    )
    return PrefixSlot(sites, data["submodules"], getattr(torch, data["dtype"]))


def site_json(site: WeightSite) -> dict[str, Any]:
    """A site as plain data."""
    return asdict(replace(site, dtype=_dtype(site.dtype)))  # type: ignore[arg-type]


def site_from_json(data: Mapping[str, Any]) -> WeightSite:
    """Read what `site_json` wrote; keys that a site does not have are left out."""
    fields = {key: value for key, value in data.items() if key in WeightSite.__dataclass_fields__}
    for key in ("uses", "bias_uses", "foreign"):
        fields[key] = tuple(Use(**use) for use in data[key])
    layout = data["layout"]
    fields["layout"] = layout and Layout(**{key: tuple(axes) for key, axes in layout.items()})
    fields |= {"shape": tuple(data["shape"]), "rows": _ranges(data["rows"])}
    return WeightSite(**fields | {"dtype": getattr(torch, data["dtype"])})


def _ranges(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in rows)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
