"""What is checked of a class when it is registered: its options, and that the compiler can call what it defines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from adaptc.errors import DefinitionError, nearest
from adaptc.registry.author import Author, place_of_function

RESERVED = frozenset(
    {
        *("method", "scheme", "name", "target", "exclude", "on_alias"),
        *("adapter", "entry", "seed", "as_stored", "trained", "allow_pickle"),
        *("options", "build", "spellings"),
    }
)
"""Names that an entry of a spec, or a pass that inserts or quantizes, uses itself."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A class that is registered.

    Attributes:
        kind: what it is, such as `method`.
        name: what a spec calls it.
        cls: the class.
        base: the class of adaptc that it extends, which says how the compiler calls it.
        author: where it is written.
    """

    kind: str
    name: str
    cls: type[Any]
    base: type[Any]
    author: Author

    def mistake(self, message: str, attribute: str = "", *advice: str) -> DefinitionError:
        """The error that names the line of an attribute, or of the class."""
        return DefinitionError(f"{self.kind} {self.name!r}: {message}", self.place(attribute), *advice)

    def place(self, attribute: str = "") -> str:
        """The file and line of an attribute, or of the class."""
        function = inspect.unwrap(_function(vars(self.cls).get(attribute)))
        return (
            place_of_function(function) if hasattr(function, "__code__") else self.author.place_of(attribute)
        )

    @property
    def shipped(self) -> bool:
        """Whether it is one of adaptc's own, which the laws of its tests hold for."""
        return self.author.module.startswith("adaptc.passes.")

    def overrides(self, attribute: str) -> bool:
        """Whether the class, or one between it and its base, defines an attribute anew."""
        return getattr(self.cls, attribute, None) is not getattr(self.base, attribute, None)


def _function(attribute: Any) -> Any:
    """The function of a method, property or class method."""
    return getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)


def check_class(
    kind: str, name: str, cls: Any, base: type[Any] | None, bases: str, author: Author
) -> Definition:
    """The definition of a frozen dataclass that extends a class of adaptc.

    Raises:
        DefinitionError: it is none.
    """
    if base is None:
        raise DefinitionError(f"{kind} {name!r}: a {kind} is a class that extends {bases}", author.place)
    definition = Definition(kind, name, cls, base, author)
    if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        word = "graph_pass" if kind == "pass" else kind
        raise definition.mistake(f"write @{word} above @dataclass(frozen=True)")
    return definition


def check_options(definition: Definition, reserved: Collection[str] = RESERVED) -> None:
    """Every option has a name of its own, a type that a spec can be held against, and a default of that type.

    Raises:
        DefinitionError: one has not.
    """
    cls, base = definition.cls, definition.base
    options = [option.name for option in dataclasses.fields(cls)]
    inherited = {name for c in base.__mro__ for name in vars(c).get("__annotations__", {})}
    for name in options:
        declared = next(
            (vars(c)["__annotations__"][name] for c in base.__mro__ if name in _annotations(c)), ""
        )
        if name in inherited and "ClassVar" in str(declared):
            raise definition.mistake(
                f"{name} is no option, but what every {definition.kind} states",
                name,
                f"write {name}: ClassVar[...] = ...",
            )
        if name not in inherited and (name in reserved or hasattr(base, name)):
            raise definition.mistake(
                f"the option {name!r} has a name that adaptc uses itself", name, "rename it"
            )
        if name.startswith(("_", "model_")) or hasattr(BaseModel, name):
            raise definition.mistake(f"the option {name!r} cannot be a key of a spec", name, "rename it")
    for spelling, name in getattr(cls, "aliases", {}).items():
        if name not in options:
            near = nearest(name, options, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise definition.mistake(
                f"aliases: {spelling!r} stands for {name!r}, which is no option{hint}", "aliases"
            )
        if spelling in options or spelling in reserved:
            raise definition.mistake(
                f"aliases: {spelling!r} is the name of something else", "aliases", "rename it"
            )
    for name in getattr(cls, "small", {}):
        if name not in options:
            raise definition.mistake(
                f"small: {name!r} is no option; its options: {_listed(options)}", "small"
            )
    if not definition.shipped:
        _check_types(definition)


def _annotations(cls: type[Any]) -> Mapping[str, Any]:
    return vars(cls).get("__annotations__", {})


def _check_types(definition: Definition) -> None:
    try:
        hints = get_type_hints(definition.cls, include_extras=True)
    except NameError as error:
        raise definition.mistake(
            f"the types of its options cannot be read: {error}",
            next((n for n, hint in _annotations(definition.cls).items() if str(error.name) in str(hint)), ""),
            "import it where it is run, not under TYPE_CHECKING",
        ) from error
    for option in dataclasses.fields(definition.cls):
        if option.name in {field.name for field in _fields(definition.base)}:
            continue
        try:
            adapter = TypeAdapter[Any](hints[option.name])
        except (PydanticUserError, TypeError) as error:
            words = str(error).splitlines()[0]
            raise definition.mistake(
                f"the option {option.name!r} has a type that a spec cannot be held against: {words}",
                option.name,
            ) from error
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            continue
        default = (
            option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        )
        try:
            adapter.validate_python(default)
        except ValidationError as error:
            words = error.errors(include_url=False)[0]["msg"].lower()
            raise definition.mistake(
                f"the default of the option {option.name!r} is {default!r}: {words}", option.name
            ) from error


def _fields(cls: type[Any]) -> Iterable[dataclasses.Field[Any]]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def check_names(definition: Definition, attribute: str, known: Collection[str], what: str) -> frozenset[str]:
    """A set of names that a class states, such as its kinds of site.

    Raises:
        DefinitionError: there is none, it is no set, or it holds a name that is not known.
    """
    names = getattr(definition.cls, attribute, None)
    first = "linear" if "linear" in known else min(known)
    example = f"such as {attribute}: ClassVar[frozenset[str]] = frozenset({{{first!r}}})"
    if names is None:
        raise definition.mistake(f"it does not say {what}", "", f"write {attribute}, {example}")
    if not isinstance(names, frozenset | set) or not names:
        raise definition.mistake(f"{attribute} is a set of names, got {names!r}", attribute, example)
    for name in names:
        if name not in known:
            near = nearest(str(name), known, 1) or [k for k in known if k.lower() == str(name).lower()]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise definition.mistake(
                f"{attribute}: unknown {name!r}{hint}", attribute, f"known: {_listed(sorted(known))}"
            )
    return frozenset(names)


def check_defined(definition: Definition, hooks: Sequence[str], why: str) -> None:
    """The class defines at least one of some methods.

    Raises:
        DefinitionError: it defines none.
    """
    if not any(definition.overrides(hook) for hook in hooks):
        own = [name for name in vars(definition.cls) if not name.startswith("_")]
        near = [name for hook in hooks for name in nearest(hook, own, 1, cutoff=0.7)]
        hint = f"; {near[0]!r} is near" if near else ""
        raise definition.mistake(f"it defines no {' or '.join(hooks)}, {why}{hint}")


def check_call(
    definition: Definition, hook: str, operands: Sequence[str], keywords: Iterable[str] | None = ()
) -> None:
    """The compiler can call a method with these arguments; with `keywords` None with any, by name.

    Raises:
        DefinitionError: it cannot.
    """
    if not definition.overrides(hook):
        return
    stated = inspect.getattr_static(definition.cls, hook)
    if isinstance(stated, property) or not callable(_function(stated)):
        raise definition.mistake(f"{hook} is a method that adaptc calls, got {type(stated).__name__}", hook)
    bound: Callable[..., Any] = stated.__func__ if isinstance(stated, staticmethod | classmethod) else stated
    first = [] if isinstance(stated, staticmethod) else [None]
    signature = inspect.signature(bound)
    shown = ", ".join(operands) + ("" if keywords == () else ", " if operands else "")
    named = [f"{key}=..." for key in keywords or ()] or ([] if keywords == () else ["**theta"])
    called = f"{hook}({shown}{', '.join(named)})"
    try:
        if keywords is None:
            signature.bind_partial(*first, *operands)
        else:
            signature.bind(*first, *operands, **dict.fromkeys(keywords))
    except TypeError as error:
        raise definition.mistake(
            f"{hook}{_shown(signature)} cannot be called as {called}: {error}", hook
        ) from error
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]
    unnamed = positional[len(first) + len(operands) :]
    if unnamed:
        raise definition.mistake(
            f"{hook}: {', '.join(unnamed)} cannot be given by name", hook, "leave out the `/`"
        )


def _shown(signature: inspect.Signature) -> str:
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
