"""What adaptc raises. Every error says where, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


class AdaptcError(Exception):
    """Something adaptc refuses or could not do; its text is meant for the person who wrote the spec.

    Args:
        message: what is wrong, in one line.
        notes: where it is, what was expected, what to do: a line each.
    """

    exit_code = 1

    def __init__(self, message: str, *notes: str):
        self.message, self.notes = message, notes
        super().__init__(message, *notes)

    def __str__(self) -> str:
        return with_notes(self.message, self.notes)


def with_notes(message: str, notes: Iterable[str]) -> str:
    """A message as it is printed: its notes below it, indented."""
    return "\n".join([message, *(f"  {note}" for note in notes)])


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a spec: its place, the words, and notes on what to do."""

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
    """The spec (or the command line) is wrong; holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[SpecError], tuple[Sequence[Problem]]]:
        return type(self), (self.problems,)


class TraceError(AdaptcError):
    """The model could not be traced into a graph; quotes the user's own source line where there is one."""


class InputError(TraceError):
    """The inputs named do not fit the model."""


class WeightError(AdaptcError):
    """A weight or checkpoint file is missing, truncated, mis-shaped, not finite, pickled or of another base."""


class ProofError(AdaptcError):
    """Two graphs that must agree do not, within the stated tolerance."""


class VerifyError(AdaptcError):
    """A graph is not legal for the stage it is in: a pass is at fault, not the spec.

    Args:
        message: what is wrong.
        notes: where it is.
        node: the name of the node at fault, where it is one.
    """

    def __init__(self, message: str, *notes: str, node: str | None = None):
        self.node = node
        super().__init__(message, *notes)


class DefinitionError(AdaptcError, ValueError):
    """A method, a scheme, a pass or a reader is written wrongly; names its author's line.

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
    """What a method or a scheme cannot do on a site: a value, which messages turn into a place in the spec.

    Attributes:
        option: the path of the option at fault inside its entry; empty where it is none of the options.
        reason: why, in words that follow the method's name.
    """

    option: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Refusal:
    """Why a pass will not rewrite something: a value, not an exception, until somebody asked for that rewrite.

    Attributes:
        reason: why, in one line.
        nodes: the names of the nodes that are in the way.
        notes: where it is, what to do: a line each.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        nodes = f" (nodes: {', '.join(self.nodes)})" if self.nodes else ""
        return with_notes(self.reason + nodes, self.notes)


class RefusedError(AdaptcError):
    """A rewrite that the spec asked for was refused; carries the refusals and the pass they came from."""

    def __init__(self, refusals: Iterable[Refusal], source: object = None):
        self.refusals = tuple(refusals)
        self.source = source
        first, *others = self.refusals
        nodes = f" (nodes: {', '.join(first.nodes)})" if first.nodes else ""
        super().__init__(first.reason + nodes, *first.notes, *(str(refusal) for refusal in others))

    def __str__(self) -> str:
        return "\n".join(str(refusal) for refusal in self.refusals)


def nearest(word: str, known: Iterable[str], count: int = 3, cutoff: float = 0.55) -> list[str]:
    """Known spellings close to a word that was not found, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)


def did_you_mean(word: str, known: Collection[str], close: Sequence[str] = ()) -> str:
    """`; did you mean 'lora'?` for a word that is none of those known, but close to some; "" if it is close to none.

    Args:
        word: what was given.
        known: the names there are.
        close: what to suggest, if not the nearest spelling.
    """
    close = close or nearest(word, known, count=1, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def unknown(
    kind: str,
    word: object,
    known: Collection[str],
    listed: Iterable[str] | None = None,
    close: Sequence[str] = (),
) -> str:
    """`unknown method 'lorra'; did you mean 'lora'? known: dora, full, ia3, lora`

    Args:
        kind: what the word should be the name of.
        word: what was given, of any type.
        known: the names there are.
        listed: of these the ones that the message lists, if not all; an empty list leaves the listing out.
        close: what to suggest, if not the nearest spelling.
    """
    listed = list(known if listed is None else listed)
    hint = did_you_mean(str(word), known, close)
    listing = f"{'' if hint else ';'} known: {', '.join(listed)}" if listed else ""
    return f"unknown {kind} {got(word)}{hint}{listing}"


def got(value: object) -> str:
    """A value as the words after 'got'."""
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
