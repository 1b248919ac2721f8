"""Alternatives as what a program takes as inputs: their forms, the slots that hold any of them, and the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptc.checkpoints.key_parts import modules_holding
from adaptc.compiler.alternatives.alternatives import Adapted, Alternative
from adaptc.compiler.folding import fold_always_on
from adaptc.compiler.plan.schedule import lower
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proofs import check_finite
from adaptc.errors import Problem, SpecError
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.aliases import alias_names
from adaptc.ir.analysis.roles import SLICES
from adaptc.ir.graph import Graph
from adaptc.ir.slices import site_slices
from adaptc.methods.method import WeightMethod
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.methods.virtual_tokens import AttentionMethod
from adaptc.rewriter.expression import extract_expression
from adaptc.rewriter.pipeline import Pass, run
from adaptc.rewriter.swap.derive import AdapterForms, MethodOnSite, Read, forms_of
from adaptc.rewriter.swap.form import NoFormError
from adaptc.rewriter.swap.prefix import VIRTUAL_TOKENS, InsertPrefix, PrefixSlot
from adaptc.rewriter.swap.record import Parameter, SlotRecord
from adaptc.rewriter.swap.slots import Slots
from adaptc.spec.emit import PROGRAMS
from adaptc.spec.spec import Spec
from adaptc.weights import Held

WAY_OUT = "fold it into a program of its own: put it under `adapt`, and write `adapters: folded`"


def emits_swap(spec: Spec) -> bool:
    """Whether a spec emits a program that takes its alternatives as inputs, or one of these."""
    return any(
        entry.format == "onnx-adapter" or (isinstance(entry, PROGRAMS) and entry.adapters == "swap")
        for entry in spec.emit
    )


def swap_slots(spec: Spec, base: Graph, alternatives: Mapping[str, Alternative]) -> Slots | None:
    """The slots that hold any one of a spec's alternatives; None where one does not fit, and none need be emitted.

    Raises:
        SpecError: one does not fit, and the spec emits a program that takes it.
    """
    adapted = {name: (other.spec, other.rewritten.adapted) for name, other in alternatives.items()}
    try:
        return slots_of(spec, base, adapted)
    except SpecError:
        if emits_swap(spec):
            raise
        return None


def slots_of(spec: Spec, base: Graph, alternatives: Adapted) -> Slots:
    """The slots that hold any one of the alternatives; no weight is read.

    Args:
        spec: the spec.
        base: the adapted graph without them.
        alternatives: the graphs with one of them.

    Raises:
        SpecError: an entry of `adapters` has no form that fits; holds one problem for each alternative.
    """
    problems: list[Problem] = []
    forms: list[AdapterForms] = []
    prefix: PrefixSlot | None = None
    for name, (stated, adapted) in alternatives.items():
        with FakeTensorMode():
            try:
                read = {n: _fake(w.shape, w.dtype) for n, w in (adapted.weights | base.weights).items()}
                read |= {n: _fake(leaf.site.shape, torch.float64) for n, leaf in base.quantized.items()}
                members = _members(base, adapted, len(spec.adapt))
                form = forms_of(members, read.__getitem__, read.__getitem__)
                prefix = _same_prefix(members, form, prefix)
                forms.append(form)
            except NoFormError as error:
                message = f"{name!r} cannot be swapped: {error}"
                problems.append(spec.source.problem(stated.place(error.entry), message, WAY_OUT))
    if problems:
        raise SpecError(problems)
    return Slots.of(forms)


def _same_prefix(
    members: Sequence[MethodOnSite], form: AdapterForms, earlier: PrefixSlot | None
) -> PrefixSlot | None:
    """The place of an adapter's virtual tokens, which is that of earlier adapters'.

    Raises:
        NoFormError: it is another.
    """
    if form.prefix is None:
        return earlier
    try:
        return form.prefix.merged(earlier)
    except NoFormError as error:
        entry = next(member.entry for member in members if isinstance(member.method, AttentionMethod))
        raise NoFormError(str(error), entry) from None


def _fake(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor, as wide as forms are computed."""
    return torch.empty(tuple(shape), dtype=torch.float64 if dtype.is_floating_point else dtype)


class Swap:
    """The alternatives of a program as inputs of one program that is the base without them.

    Attributes:
        program: the program of what is always on.
        base: its graph, with what is always on folded in.
        slots: what holds any one of the alternatives.

    Raises:
        SpecError: an alternative has no form that fits.
        RefusedError: what is always on cannot be folded.
    """

    def __init__(self, program: Program):
        self.program = program
        adapted = {name: (other.spec, other.graph) for name, other in program.alternatives.items()}
        self.slots = program.slots or slots_of(program.spec, program.graph, adapted)
        self.base = fold_always_on(program)

    def forms(self, name: str) -> AdapterForms:
        """The forms of an alternative, with its weights as they stand.

        Raises:
            ProofError: a tensor of it is not finite.
        """
        graph = self.program.alternatives[name].graph
        check_finite(graph)

        def tensor(name: str) -> torch.Tensor:
            value = graph.weights[name].exact()
            return value.double() if value.dtype.is_floating_point else value

        members = _members(self.base, graph, len(self.program.spec.adapt))
        return forms_of(members, tensor, base_reader(self.base))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """An alternative as the program takes it: name -> tensor, rounded once to the program's dtype."""
        return self.rounded(self.slots.tensors(self.forms(name)))

    def rounded(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in the dtypes that the program has for them."""
        dtypes = {name: slot.site.dtype for slot in self.slots.weights.values() for name in slot.dims}
        if self.slots.prefix is not None:
            dtypes[VIRTUAL_TOKENS] = self.slots.prefix.dtype
        dtypes |= {name: self.base.weights[name].dtype for name in self.slots.whole}
        return {name: tensor.to(dtypes[name]).contiguous() for name, tensor in tensors.items()}

    def dims(self) -> dict[str, tuple[int | str, ...]]:
        """The sizes of all that the program takes, a name for a rank."""
        whole = {name: self.base.weights[name].shape for name in self.slots.whole}
        return {**self.slots.dims(), **whole}

    def record(self) -> SlotRecord:
        """What the program says of its slots, for adapters that are made for it later."""
        base, program = self.base, self.program
        sites = {s.parameter: s.as_parameter() for s in base.sites}
        parameters = {n: Parameter(sites[n], base.weights[n].dtype) for n in self.slots.whole}
        pieces = {
            name: {s.piece: s.rows for s in site_slices(slot.site, list(SLICES), program.base)}
            for name, slot in self.slots.weights.items()
        }
        return SlotRecord(
            program.base_sha256,
            self.slots,
            parameters,
            {name: named for name, named in pieces.items() if named},
            tuple(sorted(modules_holding(program.base.weights))),
            tuple(program.base.weights),
        )

    def open_graph(self) -> Graph:
        """The program's graph as it is written: a prefix of any number of tokens is an input."""
        return self._with({}, [self.slots.prefix.insertion(None)] if self.slots.prefix is not None else [])

    def graph(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Graph:
        """The program's graph as it runs.

        Args:
            tensors: an adapter in its slots; None for the base.
        """
        given = tensors or {}
        count = len(given.get(VIRTUAL_TOKENS, ()))
        prefix = self.slots.prefix.insertion(count) if self.slots.prefix is not None and count else None
        return self._with(given, [] if prefix is None else [prefix])

    def _with(self, given: Mapping[str, torch.Tensor], prefix: Sequence[InsertPrefix]) -> Graph:
        ranks = {site: _rank(slot.dims, given) for site, slot in self.slots.weights.items() if slot.rank}
        slots = self.slots.insertion({site: rank for site, rank in ranks.items() if rank is not None})
        passes: list[Pass] = [*([slots] if self.slots.weights else []), *prefix]
        graph = run(self.base, passes) if passes else self.base.copy()
        graph.weights.update({name: Held(value) for name, value in given.items()})
        return lower(graph)


def _rank(dims: Mapping[str, Sequence[int | str]], tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The rank that an adapter's tensors have in a slot; None where it puts none there."""
    for name, sizes in dims.items():
        axis = next((axis for axis, size in enumerate(sizes) if isinstance(size, str)), None)
        if axis is not None and name in tensors:
            return tensors[name].shape[axis]
    return None


def base_reader(graph: Graph) -> Read:
    """A function that computes a weight of a graph by its name, in float64, with what is adapted in it."""
    adapted = {parameter: value for (parameter, _), value in graph.adapted_weights.items()}
    nodes = graph.by_name()

    def read(name: str) -> torch.Tensor:
        node = nodes[adapted[name]] if name in adapted else graph.copy().base_value(name)
        return extract_expression(graph, node).evaluate().double()

    return read


def _members(base: Graph, adapted: Graph, first: int) -> list[MethodOnSite]:
    """What an alternative inserts, on the sites of the graph without it.

    Args:
        base: that graph.
        adapted: the graph with the alternative.
        first: the number of the alternative's first entry.

    Raises:
        NoFormError: it changes a tensor that the base uses elsewhere too, or stores in few bits.
    """
    return [_member(base, a) for a in adapted.adaptations if a.entry >= first]


def _member(base: Graph, a: Adaptation) -> MethodOnSite:
    site = a.site
    if not isinstance(site, WeightSite):
        return MethodOnSite(a.method, site, a.params, a.entry)
    same = next(s for s in base.sites if (s.module, s.leaf) == (site.module, site.leaf))
    site = replace(site, parameter=same.parameter, bias=same.bias if site.bias else None)
    replaced = [site.parameter] if site.kind not in MATRIX_KINDS else []
    biased = isinstance(a.method, WeightMethod) and a.method.adapts_bias()
    replaced += [site.bias] if site.bias and biased else []
    for name in replaced:
        fault = _fixed(base, name, shared=a.on_alias == "share")
        if fault:
            raise NoFormError(f"{a.method.name} on {site.module}: {fault}", a.entry)
    return MethodOnSite(a.method, site, a.params, a.entry)


def _fixed(base: Graph, name: str, shared: bool) -> str | None:
    """Why a tensor of the base cannot be replaced by an input; None if it can."""
    if name in base.quantized:
        return f"{name} is stored in few bits, and would be replaced whole"
    others = [other for other in alias_names(base, name) if other != name]
    if others and not shared:
        return f"its tensor {name} is also {', '.join(others)}, which would change too"
    return None
