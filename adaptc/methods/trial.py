"""A method tried on small sites when it is registered, so that its author is told of mistakes at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import DefinitionError, Fault
from adaptc.methods.param import Param
from adaptc.methods.point_sites import AttentionSite, Heads, InputSite, Site, SubLayer
from adaptc.methods.site import Layout, Use, WeightSite
from adaptc.registry.definitions import Definition, check_call

if TYPE_CHECKING:
    from torch import Tensor

OUT, IN, BATCH, TOKENS = 24, 16, 2, 3
"""Sizes of the sites that a method is tried on."""
CHANGE = 1e-3
"""How much of the largest number of a weight a method may change at its start, by rounding."""
_untried: dict[type[Any], Definition] = {}


def try_out(definition: Definition) -> None:
    """Try a method on small sites of its kinds; where torch is not imported yet, when it is first inserted.

    Raises:
        DefinitionError: something is wrong; names the author's line.
    """
    if definition.shipped:
        return
    _untried[definition.cls] = definition
    if "torch" in sys.modules:
        try_pending(definition.cls)


def try_pending(cls: type[Any]) -> None:
    """Try a method that was registered before torch was imported, if it was.

    Raises:
        DefinitionError: something is wrong; names the author's line.
    """
    definition = _untried.get(cls)
    if definition is None:
        return
    for site in _sites(definition.cls.kinds):
        method = instance_of(definition)
        if method is not None:
            _Trial(definition, method, site).run()
    _untried.pop(cls, None)


def instance_of(definition: Definition) -> Any:
    """The method with its default options; None where one has no default."""
    given = dict(definition.cls.small)
    needed = [
        option.name
        for option in dataclasses.fields(definition.cls)
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    ]
    if set(needed) - given.keys():
        return None
    try:
        return definition.cls(**given)
    except Exception as error:
        raise definition.mistake(
            f"it cannot be made with its default options: {type(error).__name__}: {error}", "__post_init__"
        ) from error


def _sites(kinds: frozenset[str]) -> Iterator[Site]:
    """A small site of every kind."""
    import torch

    where = {"module": "layer", "dtype": torch.float32, "source": "", "uses": (Use("layer", 1),)}

    def weight(kind: str, type: str, op: str, shape: tuple[int, ...], layout: Layout | None) -> WeightSite:
        bias = ("layer.bias", (Use("layer", 2),)) if kind in ("linear", "conv") else (None, ())
        return WeightSite(
            kind=kind, type=type, op=op, parameter="layer.weight", leaf="weight", shape=shape, layout=layout,
            bias=bias[0], bias_uses=bias[1], **where,
        )  # fmt: skip

    point = {"type": "Block", **where}
    made: dict[str, Callable[[], Site]] = {
        "linear": lambda: weight("linear", "Linear", "linear", (OUT, IN), Layout((0,), (1,))),
        "conv": lambda: weight("conv", "Conv2d", "conv2d", (OUT, IN, 1, 1), Layout((0,), (1, 2, 3))),
        "embedding": lambda: weight("embedding", "Embedding", "embedding", (IN, OUT), Layout((1,), (0,))),
        "parameter": lambda: weight("parameter", "LayerNorm", "layer_norm", (IN,), None),
        "sub-layer": lambda: SubLayer(kind="sub-layer", op="linear", width=IN, reads="x", **point),
        "attention": lambda: AttentionSite(kind="attention", op="softmax", heads=Heads(2, 4, 4), **point),
        "input": lambda: InputSite(
            kind="input", op="embedding", table="layer.weight", leaf="weight", width=IN, ids="ids", **point
        ),
    }
    yield from (make() for kind, make in made.items() if kind in kinds)


class _Trial:
    """A method on one small site."""

    def __init__(self, definition: Definition, method: Any, site: Site):
        self.definition, self.method, self.site = definition, method, site

    def run(self) -> None:
        """Call everything that the compiler calls, as it does.

        Raises:
            DefinitionError: an error that the author's lines cause whatever the site, or a result of another kind.
        """
        site = self.site
        method = self.method = self._called("at", site)
        if not isinstance(method, self.definition.cls):
            raise self._mistake(f"at gives the method with the options of a site, got {method!r}", "at")
        if not self._called("takes", site) or not self._fits():
            return
        own, shared = self._called("params", site), self._called("shared", [site])
        for hook, params in (("params", own), ("shared", shared)):
            self._check_params(hook, params)
        params: dict[str, Param] = {**own, **shared}
        expressions = self.definition.base.expressions
        ran = [hook for hook in expressions if self._runs(hook)]
        for hook in ran:
            check_call(self.definition, hook, expressions[hook], params)
        if method.calibrated or method.compensates:
            return
        theta = self._started(params)
        if theta is None:
            return
        results = {hook: result for hook in ran if (result := self._ran(hook, theta)) is not None}
        if len(results) == len(ran):
            self._check_start(results, theta)
            self._check_gradients(ran, params, theta)

    def _called(self, hook: str, argument: Any) -> Any:
        """What a hook gives; errors that are not about this site in particular are the author's."""
        try:
            return getattr(self.method, hook)(argument)
        except (TypeError, AttributeError, NameError) as error:
            raise self._failed(hook, error) from error

    def _fits(self) -> bool:
        """Whether the method does not refuse the site."""
        for hook in ("refuses", "refuses_to_train"):
            fault = self._called(hook, self.site)
            if fault is not None and not isinstance(fault, Fault):
                raise self._mistake(f"{hook} gives a Fault or None, got {fault!r}", hook)
            if fault is not None:
                return False
        return True

    def _check_params(self, hook: str, params: Any) -> None:
        expressions = self.definition.base.expressions
        operands = {
            name for key in expressions if self.definition.overrides(key) for name in expressions[key]
        }
        if not isinstance(params, Mapping):
            raise self._mistake(f"{hook} gives a dict of Params, got {type(params).__name__}", hook)
        for argument, param in params.items():
            if not isinstance(argument, str) or not isinstance(param, Param):
                raise self._mistake(
                    f"{hook} gives a dict of Params by name, got {argument!r}: {param!r}", hook
                )
            if argument in operands:
                raise self._mistake(f"{hook}: {argument!r} is the name of what the expression changes", hook)
        keys = [param.key for param in params.values()]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise self._mistake(f"{hook}: two tensors have the key {twice!r} in checkpoints", hook)

    def _runs(self, hook: str) -> bool:
        """Whether an expression is used on this site."""
        if hook == "bias":
            return (
                isinstance(self.site, WeightSite) and self.site.bias is not None and self.method.adapts_bias()
            )
        return self.definition.overrides(hook)

    def _started(self, params: Mapping[str, Param]) -> dict[str, Tensor] | None:
        """The tensors as they start, as the expression takes them; None where they cannot be made here."""
        import torch

        from adaptc.weights import initial, seeded

        theta = {}
        weight = self._operands("weight")[0] if isinstance(self.site, WeightSite) else numbers(IN, IN)
        for argument, param in params.items():
            generator = seeded(0, argument)
            if isinstance(param.init, str):
                value = initial(param.init, param.shape, generator)
            else:
                try:
                    value = param.init(weight, generator)
                except (TypeError, AttributeError, NameError) as error:
                    raise self._failed("params", error, f"the init of {argument!r}", param.init) from error
                except Exception:
                    return None
                if not isinstance(value, torch.Tensor) or value.numel() != torch.Size(param.shape).numel():
                    got = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                    raise self._mistake(
                        f"the init of {argument!r} gives {got}, its shape is {param.shape}", "params"
                    )
                value = value.reshape(param.shape)
            theta[argument] = value if param.unpack is None else param.unpack(value)
        return theta

    def _operands(self, hook: str) -> tuple[Tensor, ...]:
        if hook == "weight":
            assert isinstance(self.site, WeightSite)
            return (self.site.matrix(numbers(*self.site.shape)),)
        if hook == "bias":
            return (numbers(OUT),)
        return (numbers(BATCH, TOKENS, IN),) if hook == "branch" else ()

    def _ran(self, hook: str, theta: Mapping[str, Tensor]) -> Tensor | None:
        """The result of an expression, in float32; None where it does not run on so small a site.

        Raises:
            DefinitionError: it writes to its arguments, draws numbers, depends on values, or gives something else.
        """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        operands = self._operands(hook)
        result = self._call(hook, operands, theta)
        if result is None:
            return None
        again = self._call(hook, operands, theta)
        if again is not None and not torch.equal(result, again):
            raise self._mistake(
                f"{hook} gives another result each time; an expression draws no random numbers", hook
            )
        narrow = [{k: t.bfloat16() if t.is_floating_point() else t for k, t in theta.items()}]
        self._call(hook, tuple(t.bfloat16() for t in operands), narrow[0])
        mode = FakeTensorMode()
        fakes = {k: mode.from_tensor(t) for k, t in theta.items()}
        with mode:
            self._call(hook, tuple(mode.from_tensor(t) for t in operands), fakes)
        return result

    def _call(self, hook: str, operands: tuple[Tensor, ...], theta: Mapping[str, Tensor]) -> Tensor | None:
        import torch

        from adaptc.registry.calls import ON_VALUES, blamed, read_only

        function = getattr(self.method, hook)
        names = self.definition.base.expressions[hook]
        told: list[DefinitionError] = []
        try:
            with torch.no_grad(), blamed("method", self.definition.name, function, hook):
                result: Any = read_only(function, names, operands, theta)
        except DefinitionError as error:
            cause = error.__cause__
            mistaken = cause is None or isinstance(cause, TypeError | AttributeError | NameError)
            if mistaken or ON_VALUES.search(f"{type(cause).__name__}: {cause}"):
                told.append(error)
            result = None
            if not told:
                return None
        if told:
            raise told[0]
        self._check_result(hook, result, operands, theta)
        return result

    def _check_result(
        self, hook: str, result: Any, operands: tuple[Tensor, ...], theta: Mapping[str, Tensor]
    ) -> None:
        import torch

        if not isinstance(result, torch.Tensor):
            raise self._mistake(f"{hook} gives a tensor, got {type(result).__name__}", hook)
        if operands:
            wanted, dtype = operands[0].shape, operands[0].dtype
        else:
            wanted, dtype = self._tokens(), next(iter(theta.values())).dtype
        name = next(iter(self.definition.base.expressions[hook]), "the virtual tokens")
        if result.shape != wanted:
            raise self._mistake(
                f"{hook} gives a tensor of {name}'s shape {list(wanted)}, got {list(result.shape)}", hook
            )
        if result.dtype != dtype:
            raise self._mistake(
                f"{hook} gives a tensor of {name}'s dtype, {dtype}, got {result.dtype}", hook,
                "make constants in the dtype of what they meet, such as torch.ones_like(W)",
            )  # fmt: skip

    def _tokens(self) -> tuple[int, ...]:
        """The shape of virtual tokens."""
        count = self.method.num_virtual_tokens * self.method.num_transformer_submodules
        if isinstance(self.site, AttentionSite):
            return count, self.method.columns([self.site])[-1]
        return count, IN

    def _check_start(self, results: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
        if not self.method.identity_at_init:
            return
        for hook, result in results.items():
            before = self._operands(hook)[0] if hook in ("weight", "bias") else 0.0 * result
            moved = (result - before).abs().max().item()
            if moved > CHANGE * self._operands(hook)[0].abs().max().item():
                named = ", ".join(theta)
                raise self._mistake(
                    f"{hook} changes the model before anything is trained, by {moved:.2g} with {named} as they start",
                    hook,
                    "choose another init, or write identity_at_init: ClassVar[bool] = False",
                )

    def _check_gradients(
        self, hooks: list[str], params: Mapping[str, Param], theta: Mapping[str, Tensor]
    ) -> None:
        """Every tensor that is trained gets a gradient from one of the expressions."""
        import torch

        moving = {
            k: numbers(*t.shape).requires_grad_() if params[k].trained and t.is_floating_point() else t
            for k, t in theta.items()
        }
        trained = {k: t for k, t in moving.items() if t.requires_grad}
        reached: set[str] = set()
        for hook in hooks:
            try:
                result = getattr(self.method, hook)(*self._operands(hook), **moving)
                if not result.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    result.square().sum(), list(trained.values()), allow_unused=True
                )
            except Exception:
                return
            reached |= {k for k, g in zip(trained, gradients, strict=True) if g is not None}
        idle = [k for k in trained if k not in reached]
        if idle:
            raise self._mistake(
                f"{' and '.join(hooks)} get no gradient to {', '.join(idle)}, so it cannot be trained", hooks[0],
                "use it, leave it out of params, or make it a buffer: Param(..., trained=False)",
            )  # fmt: skip

    def _mistake(self, message: str, hook: str, *advice: str) -> DefinitionError:
        return self.definition.mistake(message, hook, *advice)

    def _failed(
        self, hook: str, error: BaseException, what: str = "", function: Callable[..., Any] | None = None
    ) -> DefinitionError:
        from adaptc.registry.author import place_in

        return DefinitionError(
            f"method {self.definition.name!r}: {what or hook} fails: {type(error).__name__}: {error}",
            place_in(error, function or getattr(self.method, hook)),
        )


def numbers(*shape: int) -> Tensor:
    """Random numbers that are the same each time."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
