"""A method tried on small sites when it is registered, so that its author learns of mistakes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from adaptc.errors import Fault
from adaptc.methods.param import Param
from adaptc.methods.point_sites import Site
from adaptc.methods.site import WeightSite
from adaptc.methods.trial_expression import AUTHORS_ERRORS, ExpressionTrial, failed
from adaptc.methods.trial_sites import trial_sites
from adaptc.registry.definitions import Definition, check_call
from adaptc.registry.trials import Trials


def _attempt(definition: Definition) -> None:
    """Try a method on small sites of its kinds."""
    for site in trial_sites(definition.cls.kinds):
        method = instance_of(definition)
        if method is not None:
            _Trial(definition, method, site).run()


TRIALS = Trials(_attempt)
"""The trials of methods: when one is registered, or first inserted."""


def instance_of(definition: Definition) -> Any:
    """The method with its default options and those of `small`; None where an option has neither.

    Raises:
        DefinitionError: the class cannot be made with these options.
    """
    options = dict(definition.cls.small)
    required = {
        option.name
        for option in dataclasses.fields(definition.cls)
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    }
    if required - options.keys():
        return None
    try:
        return definition.cls(**options)
    except Exception as error:
        raise definition.mistake(
            f"it cannot be made with its default options: {type(error).__name__}: {error}", "__post_init__"
        ) from error


class _Trial:
    """The hooks of a method called on one small site, as the compiler calls them."""

    def __init__(self, definition: Definition, method: Any, site: Site):
        self.definition, self.method, self.site = definition, method, site

    def run(self) -> None:
        """Call everything that the compiler calls, in its order.

        Raises:
            DefinitionError: an error that the author's lines cause whatever the site, or a result of another kind.
        """
        site = self.site
        method = self.method = self._called("at", site)
        if not isinstance(method, self.definition.cls):
            raise self.definition.mistake(
                f"at gives the method with the options of a site, got {method!r}", "at"
            )
        if not self._called("takes", site) or not self._fits():
            return
        params = self._params("params", site) | self._params("shared", [site])
        expressions = self.definition.base.expressions
        hooks = [hook for hook in expressions if self._runs(hook)]
        for hook in hooks:
            check_call(self.definition, hook, expressions[hook], params)
        if not self.method.calibrated and not self.method.compensates:
            ExpressionTrial(self.definition, self.method, site, params).run(hooks)

    def _called(self, hook: str, argument: object) -> Any:
        """What a hook gives; errors that are not about this site in particular are the author's."""
        function = getattr(self.method, hook)
        try:
            return function(argument)
        except AUTHORS_ERRORS as error:
            raise failed(self.definition, hook, function, error) from error

    def _fits(self) -> bool:
        """Whether the method does not refuse the site."""
        for hook in ("refuses", "refuses_to_train"):
            fault = self._called(hook, self.site)
            if fault is not None and not isinstance(fault, Fault):
                raise self.definition.mistake(f"{hook} gives a Fault or None, got {fault!r}", hook)
            if fault is not None:
                return False
        return True

    def _params(self, hook: str, argument: object) -> dict[str, Param]:
        """The tensors that `params` or `shared` gives: by name, with keys of their own."""
        result = self._called(hook, argument)
        if not isinstance(result, Mapping):
            raise self.definition.mistake(f"{hook} gives a dict of Params, got {type(result).__name__}", hook)
        expressions = self.definition.base.expressions
        operands = {
            name for key in expressions if self.definition.overrides(key) for name in expressions[key]
        }
        params: dict[str, Param] = {}
        for argument_name, param in cast("Mapping[object, object]", result).items():
            if not isinstance(argument_name, str) or not isinstance(param, Param):
                raise self.definition.mistake(
                    f"{hook} gives a dict of Params by name, got {argument_name!r}: {param!r}", hook
                )
            if argument_name in operands:
                raise self.definition.mistake(
                    f"{hook}: {argument_name!r} is the name of what the expression changes", hook
                )
            params[argument_name] = param
        keys = [param.key for param in params.values()]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise self.definition.mistake(f"{hook}: two tensors have the key {twice!r} in checkpoints", hook)
        return params

    def _runs(self, hook: str) -> bool:
        """Whether an expression is used on this site."""
        if hook == "bias":
            return (
                isinstance(self.site, WeightSite) and self.site.bias is not None and self.method.adapts_bias()
            )
        return self.definition.overrides(hook)
