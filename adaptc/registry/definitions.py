"""The checks of a class when it registers: its options, its names, and that the compiler can call its methods."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from adaptc.errors import DefinitionError, did_you_mean, nearest
from adaptc.registry.author import Author, place_of_function

RESERVED = frozenset(
    {
        *("method", "scheme", "name", "target", "exclude", "on_alias"),
        *("adapter", "entry", "seed", "as_stored", "trained", "every", "allow_pickle", "ignore"),
        *("options", "build", "spellings"),
    }
)
"""Names no option may have: the keys of a spec's entries, and the fields of the passes that insert and quantize."""
MISSPELT = 0.88
"""How alike, by difflib's ratio, an attribute is to one that adaptc reads for it to be a mistake: `kind` is 0.89 like
`kinds`, while `restored`, another word, is 0.86 like `stored`."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A class that is being registered.

    Attributes:
        kind: what it is called in messages, such as `method`.
        name: its name in a spec.
        cls: the class.
        base: the class of adaptc that it extends, which declares how the compiler calls it.
        author: where it is written.
    """

    kind: str
    name: str
    cls: type[Any]
    base: type[Any]
    author: Author

    def mistake(self, message: str, attribute: str = "", *advice: str) -> DefinitionError:
        """An error about this class, at the line of an attribute; at the class's own line for ""."""
        return DefinitionError(f"{self.kind} {self.name!r}: {message}", self.place(attribute), *advice)

    def place(self, attribute: str = "") -> str:
        """`file:line` of an attribute, or of the class for ""."""
        function = inspect.unwrap(_function(vars(self.cls).get(attribute)))
        return (
            place_of_function(function) if hasattr(function, "__code__") else self.author.place_of(attribute)
        )

    @property
    def shipped(self) -> bool:
        """Whether adaptc ships it. adaptc's own tests check the types of its options, so they are not checked again."""
        return self.author.module.startswith("adaptc.passes.")

    def overrides(self, attribute: str) -> bool:
        """Whether an attribute is another one than the base's."""
        return getattr(self.cls, attribute, None) is not getattr(self.base, attribute, None)


def _function(attribute: object) -> Any:
    """The plain function of a method, property, static or class method; anything else is returned as it is."""
    return getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)


def check_class(
    kind: str, name: str, cls: Any, base: type[Any] | None, bases: str, author: Author
) -> Definition:
    """The definition of a frozen dataclass that extends a class of adaptc.

    Args:
        kind: what it is called in messages, such as `method`.
        name: its name in a spec.
        cls: what is registered.
        base: the class of adaptc that it extends; None if it extends none.
        bases: the classes it may extend, for the message.
        author: where it is written.

    Raises:
        DefinitionError: it extends none of them, or is no frozen dataclass.
    """
    if base is None:
        raise DefinitionError(f"{kind} {name!r}: a {kind} is a class that extends {bases}", author.place)
    definition = Definition(kind, name, cls, base, author)
    parameters: Any = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise definition.mistake(f"write @{decorator_of(kind)} above @dataclass(frozen=True)")
    _check_spelling(definition)
    return definition


def decorator_of(kind: str) -> str:
    """The name of the decorator that registers a kind of class or function."""
    return {"pass": "graph_pass", "reader": "stored_by"}.get(kind, kind)


def _check_spelling(definition: Definition) -> None:
    """Check that no attribute looks like a misspelt one of the base, which nothing would read."""
    stated = [name for name in dir(definition.base) if not name.startswith("_")]
    options = {option.name for option in dataclasses.fields(definition.cls)}
    for name in vars(definition.cls):
        inherited = any(hasattr(parent, name) for parent in definition.cls.__bases__)
        if name.startswith("_") or name in options or inherited:
            continue
        if nearest(name, stated, 1, cutoff=MISSPELT):
            raise definition.mistake(
                f"{name} is nothing that adaptc reads{did_you_mean(name, stated)}",
                name,
                f"a helper of the class's own starts with an underscore: _{name}",
            )


def check_options(definition: Definition, reserved: Collection[str] = RESERVED) -> None:
    """Check that every option has a free name, a type that a spec can be validated by, and a default of that type.

    Args:
        definition: the class.
        reserved: names no option may have.

    Raises:
        DefinitionError: an option, an alias or a key of `small` is wrong.
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
            hint = did_you_mean(name, options)
            raise definition.mistake(
                f"aliases: {spelling!r} is another spelling of {name!r}, which is no option{hint}", "aliases"
            )
        if spelling in options or spelling in reserved:
            raise definition.mistake(
                f"aliases: {spelling!r} is already the name of an option or key", "aliases", "rename it"
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
            message = str(error).splitlines()[0]
            raise definition.mistake(
                f"a spec cannot be validated by the type of the option {option.name!r}: {message}",
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
            message = error.errors(include_url=False)[0]["msg"].lower()
            raise definition.mistake(
                f"the default of the option {option.name!r} is {default!r}: {message}", option.name
            ) from error


def _fields(cls: type[Any]) -> Iterable[dataclasses.Field[Any]]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def check_names(
    definition: Definition, attribute: str, allowed: Collection[str], meaning: str
) -> frozenset[str]:
    """A set of names that a class states, such as its kinds of site.

    Args:
        definition: the class.
        attribute: the class variable that holds the set.
        allowed: the names it may hold.
        meaning: what the set says, as a phrase after "it does not say".

    Raises:
        DefinitionError: there is none, it is no set, or it holds a name that is not allowed.
    """
    stated: object = getattr(definition.cls, attribute, None)
    first = "linear" if "linear" in allowed else min(allowed)
    example = f"such as {attribute}: ClassVar[frozenset[str]] = frozenset({{{first!r}}})"
    if stated is None:
        raise definition.mistake(f"it does not say {meaning}", "", f"write {attribute}, {example}")
    if not isinstance(stated, frozenset | set) or not stated:
        raise definition.mistake(f"{attribute} is a set of names, got {stated!r}", attribute, example)
    names = cast("frozenset[str]", stated)
    for name in names:
        if name not in allowed:
            same = [other for other in allowed if other.lower() == str(name).lower()]
            hint = did_you_mean(str(name), allowed, same)
            raise definition.mistake(
                f"{attribute}: unknown {name!r}{hint}", attribute, f"known: {_listed(sorted(allowed))}"
            )
    return frozenset(names)


def check_defined(definition: Definition, hooks: Sequence[str], why: str) -> None:
    """Check that the class defines at least one of some methods.

    Args:
        definition: the class.
        hooks: the methods' names.
        why: what the method is needed for, as a phrase after its name.

    Raises:
        DefinitionError: it defines none of them.
    """
    if not any(definition.overrides(hook) for hook in hooks):
        attributes = [name for name in vars(definition.cls) if not name.startswith("_")]
        misspelt = [name for name in attributes if nearest(name, hooks, 1, cutoff=0.7)]
        hint = f"; it defines {misspelt[0]!r}{did_you_mean(misspelt[0], hooks)}" if misspelt else ""
        raise definition.mistake(f"it defines no {' or '.join(hooks)}, {why}{hint}")


def check_call(
    definition: Definition, hook: str, operands: Sequence[str], keywords: Iterable[str] | None = ()
) -> None:
    """Check that the compiler can call a method as it will.

    Args:
        definition: the class.
        hook: the method's name. One the class does not define is not checked.
        operands: the names of the positional arguments.
        keywords: the names of the keyword arguments; None where they are not known yet.

    Raises:
        DefinitionError: the call does not fit the method's signature.
    """
    if not definition.overrides(hook):
        return
    stated = inspect.getattr_static(definition.cls, hook)
    if isinstance(stated, property) or not callable(_function(stated)):
        raise definition.mistake(f"{hook} is a method that adaptc calls, got {type(stated).__name__}", hook)
    function: Callable[..., Any] = _function(stated)
    first = [] if isinstance(stated, staticmethod) else [None]
    signature = inspect.signature(function)
    shown = ", ".join(operands) + ("" if keywords == () else ", " if operands else "")
    named = [f"{key}=..." for key in keywords or ()] or ([] if keywords == () else ["**theta"])
    call = f"{hook}({shown}{', '.join(named)})"
    try:
        if keywords is None:
            signature.bind_partial(*first, *operands)
        else:
            signature.bind(*first, *operands, **dict.fromkeys(keywords))
    except TypeError as error:
        raise definition.mistake(
            f"{hook}{_shown(signature)} cannot be called as {call}: {error}", hook
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
