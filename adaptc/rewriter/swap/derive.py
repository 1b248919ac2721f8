"""The forms of the weight methods of an adapter: one for each weight, all its methods together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from adaptc.methods.head import HeadMethod
from adaptc.methods.method import WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.point_sites import AttentionSite, Site
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.methods.virtual_tokens import AttentionMethod, InputMethod
from adaptc.rewriter.expression import trace_expression
from adaptc.rewriter.swap.algebra import form_of
from adaptc.rewriter.swap.form import Form, NoFormError
from adaptc.rewriter.swap.prefix import PrefixSlot

Described = tuple[str, tuple[int, ...], torch.dtype]
"""A tensor by its name, shape and dtype."""
_expressions: dict[Any, fx.Graph] = {}
Read = Callable[[str], torch.Tensor]
"""Gives a tensor by its name: real, in float64 where it holds floats; or fake. Raises NoFormError where it is not
there."""


@dataclass(frozen=True)
class MethodOnSite:
    """A method at one site, with the names of its tensors.

    Attributes:
        method: with the options of this site.
        site: the site.
        tensors: argument of its expression -> (name of the tensor, its declaration).
        entry: the number of the spec's entry that it comes from.
    """

    method: Any
    site: Site
    tensors: Mapping[str, tuple[str, Param]]
    entry: int = 0


@dataclass
class AdapterForms:
    """What an adapter makes of a base, in forms that a program takes as inputs.

    Attributes:
        weights: name of a site -> the site, whole, and the form of each of its matrices.
        whole: name of a tensor of the base -> what stands in its place: biases, and parameters that are trained whole.
        prefixes: the virtual tokens of its attention methods, in the order of its entries.
        prefix: where these are; None without any.
    """

    weights: dict[str, tuple[WeightSite, list[Form]]] = field(
        default_factory=dict[str, tuple[WeightSite, list[Form]]]
    )
    whole: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    prefixes: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    prefix: PrefixSlot | None = None


def forms_of(members: Sequence[MethodOnSite], tensor: Read, base: Read) -> AdapterForms:
    """The forms of an adapter's methods, applied in order.

    Args:
        members: its methods on their sites.
        tensor: gives a tensor of the adapter.
        base: gives a tensor of the base.

    Raises:
        NoFormError: a method on a site has none; names both.
    """
    forms = AdapterForms()
    for member in members:
        try:
            if isinstance(member.method, AttentionMethod):
                _add_prefix(forms, member, members, tensor)
            else:
                _add(forms, member, tensor, base)
        except NoFormError as error:
            message = f"{member.method.name} on {member.site.module or 'the model'}: {error}"
            raise NoFormError(message, member.entry) from None
    return forms


def _add(forms: AdapterForms, member: MethodOnSite, tensor: Read, base: Read) -> None:
    """Add a method on a site to what the methods before it make of the base."""
    method, site = member.method, member.site
    if not isinstance(method, WeightMethod) or not isinstance(site, WeightSite):
        raise NoFormError(no_form(method))
    theta = {argument: tensor(name) for argument, (name, _) in member.tensors.items()}
    if site.kind not in MATRIX_KINDS:
        before = forms.whole.get(site.parameter)
        if any(other.parameter == site.parameter for other, _ in forms.weights.values()):
            raise NoFormError("another method of the adapter changes the same weight before it")
        if before is None:
            before = torch.empty(site.shape) if method.replaces else base(site.parameter)
        forms.whole[site.parameter] = method.weight(before, **_unpacked(member, theta))
        return
    whole = replace(site, rows=(), piece="")
    _, existing = forms.weights.get(site.name, (whole, [Form()] * (site.batch or 1)))
    forms.weights[site.name] = whole, _composed(member, whole, existing, theta, base)
    if site.bias is not None and method.adapts_bias():
        b = forms.whole[site.bias] if site.bias in forms.whole else base(site.bias)
        forms.whole[site.bias] = site.bias_restored(
            method.bias(site.bias_of(b), **_unpacked(member, theta)), b
        )


def no_form(method: object) -> str:
    """Why a method that changes no weight, and is no prefix, has no form that a program takes."""
    if isinstance(method, InputMethod):
        return (
            "its virtual tokens go through all layers, which a program without them has no place for; a prefix, "
            "which has keys and values of its own, can be swapped"
        )
    if isinstance(method, HeadMethod):
        return "it gives an output of its own, which a program with the base's has no place for"
    return "it is computed between the layers, and changes no weight"


def _add_prefix(
    forms: AdapterForms, member: MethodOnSite, members: Sequence[MethodOnSite], tensor: Read
) -> None:
    """Add the virtual tokens of an attention method, which all its sites share, with the first of them."""
    alike = [other for other in members if other.method == member.method and other.entry == member.entry]
    if member is not alike[0]:
        return
    sites = tuple(other.site for other in alike if isinstance(other.site, AttentionSite))
    theta = {argument: tensor(name) for argument, (name, _) in member.tensors.items()}
    tokens = member.method.tokens(**theta)
    forms.prefix = PrefixSlot(sites, member.method.num_transformer_submodules, sites[0].dtype).merged(
        forms.prefix
    )
    forms.prefixes.append(tokens)


def _composed(
    member: MethodOnSite,
    whole: WeightSite,
    existing: Sequence[Form],
    theta: Mapping[str, torch.Tensor],
    base: Read,
) -> list[Form]:
    """The forms of a site's matrices with a method on top of earlier ones."""
    method, site = member.method, member.site
    assert isinstance(site, WeightSite)
    shape = (site.out_features, site.in_features)
    owned = method.stored(site)
    unpacked = _unpacked(member, theta)
    first = {k: _one(k, v, site, owned, 0) for k, v in unpacked.items()}
    expression = _traced(method, shape, tuple((k, tuple(v.shape), v.dtype) for k, v in first.items()))
    forms: list[Form] = []
    for index, before in enumerate(existing):

        def dense(index: int = index, before: Form = before) -> torch.Tensor:
            matrix = whole.matrix(base(whole.parameter))
            value = before.applied(matrix if site.batch is None else matrix[index])
            return value if not site.rows else torch.cat([value[a:b] for a, b in site.rows])

        unpacked_alone = {k: _one(k, v, site, owned, index) for k, v in unpacked.items()}
        form = form_of(expression, unpacked_alone, shape, dense)
        forms.append(before.then(form.of_rows(site.rows, whole.out_features) if site.rows else form))
    return forms


def _one(
    argument: str, value: torch.Tensor, site: WeightSite, owned: Mapping[str, Param], index: int
) -> torch.Tensor:
    """A tensor of a method for one of a site's matrices."""
    return value[index] if site.batch is not None and argument in owned else value


def _unpacked(member: MethodOnSite, theta: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A method's tensors as its expression takes them."""
    unpack = {argument: param.unpack for argument, (_, param) in member.tensors.items()}
    return {a: call(v) if (call := unpack[a]) is not None else v for a, v in theta.items()}


def _traced(method: WeightMethod, shape: tuple[int, int], theta: Sequence[Described]) -> fx.Graph:
    """The expression of a method on a weight `(out, in)` in float64; traced once for tensors of the same shapes.

    Args:
        method: the method.
        shape: (out, in).
        theta: its tensors: argument, shape and dtype.
    """
    key = (type(method), repr(method), shape, theta)
    if key not in _expressions:
        with unset_fake_temporarily(), FakeTensorMode():
            W = torch.empty(shape, dtype=torch.float64)
            fakes = {argument: torch.empty(sizes, dtype=dtype) for argument, sizes, dtype in theta}
            _expressions[key] = trace_expression(method.weight, [W], fakes)
    return _expressions[key]
