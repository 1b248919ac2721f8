"""The errors adaptc raises, and the values that say why something is refused.

Every message says where the mistake is, what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


class AdaptcError(Exception):
    """Base of every error adaptc raises on purpose. Its text is for the person who wrote the spec.

    Args:
        message: what is wrong, in one line.
        notes: where it is, what was expected, what to do: a line each.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, *notes: str):
        self.message, self.notes = message, notes
        super().__init__(message, *notes)

    def __str__(self) -> str:
        return with_notes(self.message, self.notes)


def with_notes(message: str, notes: Iterable[str]) -> str:
    """A message as it is printed: each note on a line of its own below it, indented by two spaces."""
    return "\n".join([message, *(f"  {note}" for note in notes)])


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a spec or on the command line.

    Attributes:
        message: what is wrong, in one line.
        file: the file's path, or another name of the text: `--set adapt.0.r=0`, `<dict>`.
        line: counted from 1; None where the text has no lines.
        column: counted from 1; None where the text has no lines.
        text: the line as written, which is quoted below the message.
        key: the dotted path of the key at fault, such as `adapt.0.r`.
        notes: what was expected, what to do: a line each.
    """

    message: str
    file: str = "<spec>"
    line: int | None = None
    column: int | None = None
    text: str = ""
    key: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        lines = [f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"]
        if self.line is not None and self.text:
            number = str(self.line).rjust(4)
            caret = " " * ((self.column or 1) - 1) + "^"
            lines += [f"{number} | {self.text}", f"{' ' * len(number)} | {caret}"]
        return with_notes("\n".join(lines), self.notes)


class SpecError(AdaptcError):
    """The spec, or the command line, is wrong.

    Args:
        problems: everything found wrong, not only the first.
    """

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[SpecError], tuple[Sequence[Problem]]]:
        return type(self), (self.problems,)


class TraceError(AdaptcError):
    """The model could not be traced into a graph. Quotes the user's own source line where there is one."""


class InputError(TraceError):
    """The inputs that the spec names do not fit the model."""


class WeightError(AdaptcError):
    """A file of weights cannot be used.

    It is missing, truncated or pickled, it belongs to another base, or a tensor in it has the wrong shape or contains
    NaN or infinity (non-finite).
    """


class ProofError(AdaptcError):
    """Two programs that must compute the same differ by more than the stated tolerance."""


class VerifyError(AdaptcError):
    """A graph is not legal for the stage it is in. A pass is at fault, not the spec.

    Args:
        message: what is wrong.
        notes: where it is.
        node: the name of the node at fault; None where it is no single node.
    """

    def __init__(self, message: str, *notes: str, node: str | None = None):
        self.node = node
        super().__init__(message, *notes)


class DefinitionError(AdaptcError, ValueError):
    """A method, a scheme, a pass or a reader has a mistake. Names the line of whoever wrote it.

    Args:
        message: what is wrong.
        place: the author's file and line, and the text there.
        advice: what to do.
    """

    def __init__(self, message: str, place: str, *advice: str):
        self.place = place
        super().__init__(message, f"at {place}", *advice)


@dataclass(frozen=True)
class Fault:
    """Why a method or a scheme cannot be used on a site. It is a value; the compiler finds its place in the spec.

    Attributes:
        option: the path of the option at fault inside its entry; empty where no option is at fault.
        reason: why, as a phrase that follows the name of the method or scheme.
        advice: what to do: a line each.
    """

    option: tuple[str, ...]
    reason: str
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a pass does not rewrite something. It is a value; it becomes an error where the spec asked for the rewrite.

    Attributes:
        reason: why, in one line.
        nodes: the names of the nodes that prevent it.
        notes: where it is, what to do: a line each.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        nodes = f" (nodes: {', '.join(self.nodes)})" if self.nodes else ""
        return with_notes(self.reason + nodes, self.notes)


class RefusedError(AdaptcError):
    """A rewrite that the spec asked for was refused.

    Args:
        refusals: why, at least one.
        source: the pass that refused; None where it was none.
    """

    def __init__(self, refusals: Iterable[Refusal], source: object = None):
        self.refusals = tuple(refusals)
        self.source = source
        first, *others = self.refusals
        nodes = f" (nodes: {', '.join(first.nodes)})" if first.nodes else ""
        super().__init__(first.reason + nodes, *first.notes, *(str(refusal) for refusal in others))

    def __str__(self) -> str:
        return "\n".join(str(refusal) for refusal in self.refusals)


def nearest(word: str, names: Iterable[str], count: int = 3, cutoff: float = 0.55) -> list[str]:
    """The names that are spelled most like a word, best first.

    Args:
        word: what was given.
        names: what it could have meant.
        count: how many to return at most.
        cutoff: the least similarity, `difflib`'s ratio from 0 to 1; by default a little below `difflib`'s own 0.6.
    """
    return difflib.get_close_matches(word, list(names), n=count, cutoff=cutoff)


def did_you_mean(word: str, names: Collection[str], close: Sequence[str] = ()) -> str:
    """The end of a message about a misspelt name: `; did you mean 'lora'?`, or "" if it is close to none.

    Args:
        word: what was given.
        names: the names there are.
        close: what to suggest, if not the nearest spelling.
    """
    close = close or nearest(word, names, count=1, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def unknown(
    kind: str,
    word: object,
    names: Collection[str],
    listed: Iterable[str] | None = None,
    close: Sequence[str] = (),
) -> str:
    """The message about a name that does not exist: `unknown method 'lorra'; did you mean 'lora'? known: dora, lora`.

    Args:
        kind: what the word should be the name of.
        word: what was given, of any type.
        names: the names there are.
        listed: the names to list, if not all; an empty list leaves the listing out.
        close: what to suggest, if not the nearest spelling.
    """
    listed = list(names if listed is None else listed)
    hint = did_you_mean(str(word), names, close)
    listing = f"{'' if hint else ';'} known: {', '.join(listed)}" if listed else ""
    return f"unknown {kind} {got(word)}{hint}{listing}"


def got(value: object) -> str:
    """How a message names a value it was given: `nothing`, `true`, `a mapping`, `a list`, or its repr, shortened."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return reprlib.repr(value)
