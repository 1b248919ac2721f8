"""The expressions of a method run on a small site: what they give, where they start, and what they train."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from adaptc.errors import DefinitionError
from adaptc.methods.param import Param
from adaptc.methods.point_sites import Site
from adaptc.methods.site import WeightSite
from adaptc.methods.trial_sites import IN, numbers, operands, tokens_shape, twice_as_large
from adaptc.registry.definitions import Definition

if TYPE_CHECKING:
    from torch import Tensor

CHANGE = 1e-3
"""The largest change at the start that counts as rounding, as a share of the largest number of the weight. Chosen, not
measured: float32 rounds a thousand times less, and a start that is not the base's changes more."""
FREE = ("pooled", "scores")
"""Expressions whose result has a shape of its own."""
AUTHORS_ERRORS = (TypeError, AttributeError, NameError)
"""Errors that a line causes whatever the site; others may be about sizes of the small site."""


@dataclass(frozen=True)
class ExpressionTrial:
    """The expressions of a method on one small site.

    Attributes:
        definition: the class, and where it is written.
        method: the method with the options of the site.
        site: the small site.
        params: the tensors of the site and those shared, by the names that the expressions take them by.
    """

    definition: Definition
    method: Any
    site: Site
    params: Mapping[str, Param]

    def run(self, hooks: Sequence[str]) -> None:
        """Compute expressions with the tensors as they start.

        Raises:
            DefinitionError: one fails, writes to its arguments, draws random numbers, depends on values, gives a
                tensor of another shape or dtype, changes the model at the start, or trains some tensor not at all.
        """
        theta = self._initial()
        if theta is None:
            return
        results = {hook: self._computed(hook, theta) for hook in hooks}
        computed = {hook: result for hook, result in results.items() if result is not None}
        if len(computed) == len(hooks):
            self._check_start(computed, theta)
            self._check_gradients(hooks, theta)

    def _initial(self) -> dict[str, Tensor] | None:
        """The tensors as they start, as the expression takes them; None where they cannot be made on this site."""
        import torch

        from adaptc.weights import initial, seeded

        theta: dict[str, Tensor] = {}
        weight = operands("weight", self.site)[0] if isinstance(self.site, WeightSite) else numbers(IN, IN)
        for argument, param in self.params.items():
            generator = seeded(0, argument)
            value: object
            if isinstance(param.init, str):
                value = initial(param.init, param.shape, generator)
            else:
                init = cast("Callable[..., object]", param.init)
                try:
                    value = init(weight, generator)
                except AUTHORS_ERRORS as error:
                    raise failed(self.definition, f"the init of {argument!r}", param.init, error) from error
                except Exception:
                    return None
            if not isinstance(value, torch.Tensor) or value.numel() != torch.Size(param.shape).numel():
                given = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                raise self.definition.mistake(
                    f"the init of {argument!r} gives {given}, its shape is {param.shape}", "params"
                )
            value = value.reshape(param.shape)
            theta[argument] = value if param.unpack is None else param.unpack(value)
        return theta

    def _computed(self, hook: str, theta: Mapping[str, Tensor]) -> Tensor | None:
        """The result of an expression, in float32; None where it does not run on so small a site."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        given = self._operands(hook, theta)
        try:
            result = self._call(hook, given, theta)
        except DefinitionError as error:
            if _is_authors(error):
                raise
            if not self._sized_by_site():
                return None
            raise DefinitionError(
                error.message,
                error.place,
                "correct it; or, if it cannot compute on such a site, say so in `refuses`, or state options that fit "
                "so small a site in `small`",
            ) from error
        values = self._trained(theta)
        first, second = self._attempt(hook, given, values), self._attempt(hook, given, values)
        if (
            first is not None
            and second is not None
            and not torch.equal(first.nan_to_num(), second.nan_to_num())
        ):
            raise self.definition.mistake(
                f"{hook} gives another result each time; an expression draws no random numbers", hook
            )
        narrow = {k: t.bfloat16() if t.is_floating_point() else t for k, t in theta.items()}
        self._attempt(hook, tuple(t.bfloat16() if t.is_floating_point() else t for t in given), narrow)
        mode = FakeTensorMode()
        fakes: dict[str, Tensor] = {k: mode.from_tensor(t) for k, t in theta.items()}
        with mode:
            self._attempt(hook, tuple(mode.from_tensor(t) for t in given), fakes)
        return result

    def _operands(self, hook: str, theta: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What an expression gets before its own tensors: `scores` of a head what `pooled` gives."""
        if hook != "scores":
            return operands(hook, self.site)
        return (self._call("pooled", operands("pooled", self.site), theta),)

    def _attempt(self, hook: str, given: tuple[Tensor, ...], theta: Mapping[str, Tensor]) -> Tensor | None:
        """The result of one call; None where it fails for a reason that may be the small site's or the dtype's."""
        try:
            return self._call(hook, given, theta)
        except DefinitionError as error:
            if _is_authors(error):
                raise
            return None

    def _call(self, hook: str, given: tuple[Tensor, ...], theta: Mapping[str, Tensor]) -> Tensor:
        """The result of one call.

        Raises:
            DefinitionError: it fails, for whatever reason, or gives a tensor of another shape or dtype.
        """
        import torch

        from adaptc.registry.calls import blamed, read_only

        function: Callable[..., Tensor] = getattr(self.method, hook)
        names = self.definition.base.expressions[hook]
        on = " and ".join(f"{name} of shape {list(t.shape)}" for name, t in zip(names, given, strict=True))
        with torch.no_grad(), blamed("method", self.definition.name, function, hook, on):
            result = read_only(function, names, given, theta)
        self._check_result(hook, result, given, theta)
        return result

    def _trained(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as after some training: random numbers, which require gradients, for those that are trained."""
        return {
            k: numbers(*t.shape).requires_grad_() if self.params[k].trained and t.is_floating_point() else t
            for k, t in theta.items()
        }

    def _sized_by_site(self) -> bool:
        """Whether the shapes of the tensors follow the site's, so that they should fit a site of any size."""
        site = twice_as_large(self.site)
        try:
            method = self.method.at(site)
            params: Mapping[str, Param] = {**method.params(site), **method.shared([site])}
        except Exception:
            return False
        return any(params[k].shape != param.shape for k, param in self.params.items() if k in params)

    def _check_result(
        self, hook: str, result: object, given: Sequence[Tensor], theta: Mapping[str, Tensor]
    ) -> None:
        import torch

        if not isinstance(result, torch.Tensor):
            raise self.definition.mistake(f"{hook} gives a tensor, got {type(result).__name__}", hook)
        if given:
            shape, dtype = tuple(given[0].shape), given[0].dtype
        else:
            shape, dtype = tokens_shape(self.method, self.site), next(iter(theta.values())).dtype
        name = next(iter(self.definition.base.expressions[hook]), "the virtual tokens")
        if hook not in FREE and result.shape != shape:
            raise self.definition.mistake(
                f"{hook} gives a tensor of {name}'s shape {list(shape)}, got {list(result.shape)}", hook
            )
        if result.dtype != dtype:
            raise self.definition.mistake(
                f"{hook} gives a tensor of {name}'s dtype, {dtype}, got {result.dtype}", hook,
                "make constants in the dtype of what they meet, such as torch.ones_like(W)",
            )  # fmt: skip

    def _check_start(self, results: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
        """A method that says so starts as the base: its results are the operands, or zero of a branch."""
        if not self.method.identity_at_init:
            return
        for hook, result in results.items():
            (operand,) = operands(hook, self.site)
            start = operand if hook in ("weight", "bias") else 0.0 * result
            change = (result - start).abs().max().item()
            if change > CHANGE * operand.abs().max().item():
                raise self.definition.mistake(
                    f"{hook} changes the model before anything is trained, by {change:.2g} with {', '.join(theta)} "
                    "as they start",
                    hook,
                    "choose another init, or write identity_at_init: ClassVar[bool] = False",
                )

    def _check_gradients(self, hooks: Sequence[str], theta: Mapping[str, Tensor]) -> None:
        """Every tensor that is trained gets a gradient from one of the expressions."""
        import torch

        values = self._trained(theta)
        trained = {k: t for k, t in values.items() if t.requires_grad}
        reached: set[str] = set()
        for hook in hooks:
            try:
                given = operands(hook, self.site)
                if hook == "scores":
                    given = (self.method.pooled(*operands("pooled", self.site), **values),)
                result: Tensor = getattr(self.method, hook)(*given, **values)
                if not result.requires_grad:
                    continue
                gradients = cast(
                    "Sequence[Tensor | None]",
                    torch.autograd.grad(result.square().sum(), list(trained.values()), allow_unused=True),
                )
            except Exception:
                return
            reached |= {k for k, g in zip(trained, gradients, strict=True) if g is not None}
        idle = [k for k in trained if k not in reached]
        if idle:
            raise self.definition.mistake(
                f"{' and '.join(hooks)} get no gradient to {', '.join(idle)}, so it cannot be trained", hooks[0],
                "use it, leave it out of params, or make it a buffer: Param(..., trained=False)",
            )  # fmt: skip


def _is_authors(error: DefinitionError) -> bool:
    """Whether a line of the author's causes an error, whatever the site and the dtype."""
    from adaptc.registry.calls import ON_VALUES

    cause = error.__cause__
    return (
        cause is None
        or isinstance(cause, AUTHORS_ERRORS)
        or re.search(ON_VALUES, f"{type(cause).__name__}: {cause}") is not None
    )


def failed(
    definition: Definition, name: str, function: Callable[..., object], error: BaseException
) -> DefinitionError:
    """The error that names the line of an author's function that failed; `name` is the function's in messages."""
    from adaptc.registry.author import place_in

    return DefinitionError(
        f"method {definition.name!r}: {name} fails: {type(error).__name__}: {error}",
        place_in(error, function),
    )
