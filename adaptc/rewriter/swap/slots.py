"""Slots: the places of a program where an adapter's scales and products go in, and the pass that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection
from adaptc.methods.method import WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.rewriter.insert.base import parameter_name
from adaptc.rewriter.insert.weight import InsertWeight
from adaptc.rewriter.swap.derive import AdapterForms
from adaptc.rewriter.swap.form import Form, NoFormError
from adaptc.rewriter.swap.prefix import VIRTUAL_TOKENS, PrefixSlot, in_order

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS, A, B = "rows", "columns", "A", "B"
TRACED_RANK = 2
"""The rank of a slot in a graph. A program takes any; this one is small, so that a product is never multiplied out."""


@dataclass(frozen=True)
class Slot:
    """What the adapters of a program may change at one site: the tensors that go in there.

    Attributes:
        site: the site, whole.
        rows: whether the rows of its weight can be scaled.
        columns: whether its columns can.
        rank: the rank of its product in a graph; 0 where nothing can be added to it.
    """

    site: WeightSite
    rows: bool = False
    columns: bool = False
    rank: int = 0

    @property
    def method(self) -> SlotMethod:
        """The slot as a method on its site."""
        return SlotMethod({self.site.name: self})

    @property
    def names(self) -> dict[str, str]:
        """Tensor of the form -> its name in the program."""
        params = self.method.at(self.site).stored(self.site)
        return {key: parameter_name(self.site, self.method, "", param) for key, param in params.items()}

    @property
    def dims(self) -> dict[str, tuple[int | str, ...]]:
        """Name in the program -> its sizes, with the name of the rank in place of a number."""
        params = self.method.at(self.site).stored(self.site)
        axes = _rank_axes(self.site)
        rank = f"{self.site.name}.rank"
        return {
            self.names[key]: tuple(
                rank if axis == axes.get(key) else size for axis, size in enumerate(param.shape)
            )
            for key, param in params.items()
        }

    def merged(self, other: Slot) -> Slot:
        """A slot for all that either takes."""
        return replace(
            self,
            rows=self.rows or other.rows,
            columns=self.columns or other.columns,
            rank=max(self.rank, other.rank),
        )

    def tensors(self, forms: Sequence[Form]) -> dict[str, Tensor]:
        """The forms of the site's matrices as the tensors of the slot.

        Returns:
            Name in the program -> tensor, in the dtype of the forms; without what the forms leave as it is.
        """
        import torch

        named: dict[str, list[Tensor]] = {}
        if any(form.rows is not None for form in forms):
            named[ROWS] = [_scale(form.rows, self.site.out_features, forms) for form in forms]
        if any(form.columns is not None for form in forms):
            named[COLUMNS] = [_scale(form.columns, self.site.in_features, forms) for form in forms]
        products = [form.product for form in forms]
        if any(product is not None for product in products):
            named[A] = [product.right for product in products if product is not None]
            named[B] = [product.left for product in products if product is not None]
        for key, reason in (
            (ROWS, "scales its outputs"),
            (COLUMNS, "scales its inputs"),
            (A, "adds to its weight"),
        ):
            if key in named and key not in self.names:
                raise NoFormError(f"the program has no place for what {reason} on {self.site.module}")
        params = self.method.at(self.site).params(self.site)
        batch = self.site.batch
        return {
            self.names[key]: torch.stack(values)
            if batch is not None
            else _packed(key, values[0], self.site, params[key])
            for key, values in named.items()
        }


@dataclass(frozen=True)
class SlotMethod(WeightMethod):
    """W' = diag(rows) W diag(columns) + B A        rows (out,)   columns (in,)   A (r, in)   B (out, r)

    The form that the adapters of a program share. It is no method of a spec: programs have it in place of methods.

    Attributes:
        slots: name of a site -> its slot.
    """

    slots: Mapping[str, Slot] = field(default_factory=dict[str, Slot])

    name: ClassVar[str] = "swap"
    kinds = MATRIX_KINDS

    def at(self, site: WeightSite) -> Self:
        """The method with the slot of one site alone."""
        return replace(self, slots={site.name: self.slots[site.name]})

    def params(self, site: WeightSite) -> dict[str, Param]:
        """The tensors of the site's slot, as the program takes them."""
        slot = self.slots[site.name]
        out, inner, r = site.out_features, site.in_features, slot.rank
        params: dict[str, Param] = {}
        if slot.rows:
            params[ROWS] = Param((out,), "ones", "adapter_rows")
        if slot.columns:
            params[COLUMNS] = Param((inner,), "ones", "adapter_columns")
        if r and site.kind == "embedding":  # rows of A's transpose are looked up
            params[A] = Param((inner, r), "zeros", "adapter_A", lambda value: value.t())
            params[B] = Param((out, r), "zeros", "adapter_B")
        elif r and site.kind == "conv" and site.groups == 1 and "transpose" not in site.op:
            ones = (1,) * (len(site.shape) - 2)
            params[A] = Param((r, *site.inner_shape), "zeros", "adapter_A", lambda value: value.flatten(1))
            params[B] = Param((out, r, *ones), "zeros", "adapter_B", lambda value: value.flatten(1))
        elif r:
            params[A] = Param((r, inner), "zeros", "adapter_A")
            params[B] = Param((out, r), "zeros", "adapter_B")
        return params

    def weight(
        self,
        W: Tensor,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        A: Tensor | None = None,
        B: Tensor | None = None,
    ) -> Tensor:
        """The adapted weight, of shape (out, in)."""
        scaled = W if rows is None else rows.unsqueeze(1) * W
        scaled = scaled if columns is None else scaled * columns.unsqueeze(0)
        return scaled if A is None or B is None else scaled + B @ A


@dataclass(frozen=True)
class InsertSlots(InsertWeight, inserts=SlotMethod):
    """Every slot goes in front of its site, whatever the graph has there already."""

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "folded"})

    def selection(self, graph: Graph) -> Selection[WeightSite]:
        """The sites of the slots."""
        return Selection(tuple(slot.site for slot in self.method.slots.values()))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Slots:
    """All that the adapters of a program may change.

    Attributes:
        weights: name of a site -> its slot.
        whole: the names of the base's own tensors that an adapter may replace.
        prefix: where virtual tokens go; None where no adapter has any.
    """

    weights: Mapping[str, Slot] = field(default_factory=dict[str, Slot])
    whole: tuple[str, ...] = ()
    prefix: PrefixSlot | None = None

    @classmethod
    def of(cls, adapters: Iterable[AdapterForms]) -> Slots:
        """The slots that hold any one of these adapters."""
        weights: dict[str, Slot] = {}
        whole: dict[str, None] = {}
        prefix: PrefixSlot | None = None
        for adapter in adapters:
            prefix = adapter.prefix.merged(prefix) if adapter.prefix is not None else prefix
            for name, (site, forms) in adapter.weights.items():
                slot = Slot(
                    site,
                    any(form.rows is not None for form in forms),
                    any(form.columns is not None for form in forms),
                    TRACED_RANK * any(bool(form.products) for form in forms),
                )
                weights[name] = weights[name].merged(slot) if name in weights else slot
            whole |= dict.fromkeys(adapter.whole)
        return cls(weights, tuple(whole), prefix)

    def insertion(self, ranks: Mapping[str, int] | None = None) -> InsertSlots:
        """The pass that makes the slots.

        Args:
            ranks: name of a site -> the rank of its product, where it is not `TRACED_RANK`.
        """
        given = ranks or {}
        slots = {
            name: replace(slot, rank=given.get(name, slot.rank)) if slot.rank else slot
            for name, slot in self.weights.items()
        }
        return InsertSlots(SlotMethod(slots), adapter="")  # type: ignore[arg-type]

    def dims(self) -> dict[str, tuple[int | str, ...]]:
        """Name of a tensor that goes into a slot -> its sizes, a name for a rank."""
        every = [*self.weights.values(), *([self.prefix] if self.prefix is not None else [])]
        return {name: dims for slot in every for name, dims in slot.dims.items()}

    def tensors(self, adapter: AdapterForms) -> dict[str, Tensor]:
        """An adapter as the tensors that a program takes: name -> tensor.

        Raises:
            NoFormError: the program has no place for some of it.
        """
        named: dict[str, Any] = {}
        for name, (_, forms) in adapter.weights.items():
            named |= self.weights[name].tensors(forms)
        if adapter.prefixes:
            if self.prefix is None:
                raise NoFormError("the program has no place for virtual tokens")
            self.prefix.merged(adapter.prefix)
            named[VIRTUAL_TOKENS] = in_order(adapter.prefixes)
        return named | adapter.whole


def _rank_axes(site: WeightSite) -> dict[str, int]:
    """The axis of the rank of A and of B."""
    if site.batch is not None:
        return {A: 1, B: 2}
    return {A: 1 if site.kind == "embedding" else 0, B: 1}


def _scale(scale: Tensor | None, size: int, forms: Sequence[Form]) -> Tensor:
    """A scale, or ones like those of the other matrices."""
    if scale is not None:
        return scale
    import torch

    return torch.ones(size, dtype=torch.float64)


def _packed(key: str, value: Tensor, site: WeightSite, param: Param) -> Tensor:
    """A tensor of one matrix as the program takes it: with the axes of a kernel, or an embedding's A transposed."""
    if key == A and site.kind == "embedding":
        return value.t().contiguous()
    if key in (A, B) and len(param.shape) > 2:
        r_first = key == A
        sizes = (
            (value.shape[0], *param.shape[1:])
            if r_first
            else (value.shape[0], value.shape[1], *param.shape[2:])
        )
        return value.reshape(sizes)
    return value
