"""Adapters as plain data: enough to save, load and swap their tensors without the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.adapter_checks import load, match
from adaptc.methods.method import METHODS, Method
from adaptc.methods.peft_format import PeftFormat


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter.

    Attributes:
        name: its name in the graph.
        key: its key in a checkpoint, without PEFT's prefix; `adapter_checks.spelled` adds that.
        shape: its shape.
        argument: the argument of the method's expression that it is.
        site: the site it belongs to, by its pattern or the parameter's name; "" for a tensor that all sites share.
        trained: whether it gets a gradient.
        stored: whether checkpoints hold it.
        below: the exclusive upper bound of indices; None for a tensor of numbers.
        copies: the keys under which PEFT writes the same tensor once more, for tied modules.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    argument: str
    site: str
    trained: bool
    stored: bool
    below: int | None
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterRecord:
    """One method of one entry of a spec, as inserted.

    Attributes:
        adapter: the adapter's name.
        entry: the position of its entry in the spec, from 0.
        method: the method's name.
        options: the options of the entry.
        modules: the modules that PEFT would be told to target.
        parameters: the parameters that PEFT would be told to target by name.
        patterns: what adaptc would be told to target.
        transposed: some weight is stored `(in, out)`.
        ambiguous: a module's name is the ending of another's that is not adapted, so that PEFT's rule for lists of
            names would adapt both.
        in_peft: PEFT has this method on all of these sites.
        sizes: keys of PEFT's configuration that follow from the sites.
        heads: the base's tensors that PEFT expects in the checkpoint where the task is to classify.
        tied: it changes a tied tensor under all its names (`on_alias: share`).
        tensors: its tensors.
    """

    adapter: str
    entry: int
    method: str
    options: Mapping[str, Any]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    patterns: tuple[str, ...]
    transposed: bool
    ambiguous: bool
    in_peft: bool
    sizes: Mapping[str, int]
    heads: tuple[str, ...]
    tied: bool
    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterRecord:
        """Read a record that `as_json` wrote."""
        tensors = tuple(_tensor(tensor) for tensor in data["tensors"])
        lists = {key: tuple(data[key]) for key in ("modules", "parameters", "patterns", "heads")}
        fields: dict[str, Any] = {**data, **lists, "tensors": tensors}
        return cls(**fields)

    @property
    def stored(self) -> list[AdapterTensor]:
        """The tensors that checkpoints hold."""
        return [tensor for tensor in self.tensors if tensor.stored]

    @property
    def instance(self) -> Method[Any]:
        """The method with the options of the entry."""
        return TypeAdapter(METHODS[self.method]).validate_python(dict(self.options))

    @property
    def format(self) -> PeftFormat[Any] | None:
        """How PEFT spells the method, if PEFT has it on these sites."""
        return METHODS[self.method].peft if self.in_peft else None

    def sites(self, values: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Group tensors by the site they belong to.

        Args:
            values: the tensors by their names in the graph; those of other adapters are left out.

        Returns:
            Site -> argument of the method's expression -> tensor.
        """
        by_site: dict[str, dict[str, torch.Tensor]] = {}
        for tensor in self.tensors:
            if tensor.site and tensor.name in values:
                by_site.setdefault(tensor.site, {})[tensor.argument] = values[tensor.name]
        return by_site

    def by_name(self, sites: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Name the tensors that `sites` grouped as the graph does.

        Args:
            sites: site -> argument of the method's expression -> tensor.
        """
        tensors = [t for t in self.tensors if t.argument in sites.get(t.site, {})]
        return {tensor.name: sites[tensor.site][tensor.argument] for tensor in tensors}

    def with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> AdapterRecord:
        """The record with other shapes of the tensors named."""
        return replace(
            self, tensors=tuple(replace(t, shape=shapes.get(t.name, t.shape)) for t in self.tensors)
        )


def _tensor(data: Mapping[str, Any]) -> AdapterTensor:
    fields: dict[str, Any] = {**data, "shape": tuple(data["shape"]), "copies": tuple(data["copies"])}
    return AdapterTensor(**fields)


def as_json(records: Sequence[AdapterRecord]) -> list[dict[str, Any]]:
    """Records as plain data, for a manifest; the keys are the fields of `AdapterRecord`."""
    return [asdict(record) for record in records]


def assign(checkpoint: Checkpoint, records: Sequence[AdapterRecord]) -> dict[str, torch.Tensor]:
    """Load the tensors of a checkpoint for the adapters that it belongs to.

    Returns:
        Name in the graph -> tensor.

    Raises:
        WeightError: the tensors do not fit the records, or one contains NaN or infinity.
    """
    tensors = [tensor for record in records for tensor in record.stored]
    expected = {tensor.key: tensor for tensor in tensors}
    match(checkpoint, expected)
    values = load(checkpoint, expected)
    return {tensor.name: values[tensor.key] for tensor in tensors}
