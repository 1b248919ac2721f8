"""Passes, and the runner that checks them: requires, call, ensures, then the stage's legality table."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from adaptc.author import Author
from adaptc.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.errors import AdaptcError, Refusal, RefusedError, VerifyError
from adaptc.graph import STAGES, Graph
from adaptc.names import nearest
from adaptc.registry import Registry
from adaptc.verify import verify


class Pass:
    """A transformation of a graph. Subclasses are frozen dataclasses whose fields are the options.

    A pass rewrites the graph it is given in place; the runner hands it a copy of the user's.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset(STAGES)
    """The stages it can start from."""
    leaves: ClassVar[str | None] = None
    """The stage it leaves; None where it does not change it."""

    def requires(self, graph: Graph) -> list[Refusal]:
        """Why this graph cannot be rewritten; empty if it can."""
        return []

    def call(self, graph: Graph) -> bool:
        """Rewrite the graph; True if anything changed."""
        raise NotImplementedError

    def ensures(self, graph: Graph) -> str | None:
        """What does not hold afterwards though it must, or None."""
        return None


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: for the manifest and the screen."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool


WORDS = ("insert", "quantize", "all", "trace")
"""Names that mean something else where a pass may be named."""


def _check(name: str, cls: Any, author: Author) -> None:
    base = Pass if isinstance(cls, type) and issubclass(cls, Pass) else None
    definition = check_class("pass", name, cls, base, "Pass", author)
    generated = name.startswith(("insert-", "quantize-"))
    if name in WORDS or generated:
        what = "inserts a method or quantizes by a scheme" if generated else "means something else in a spec"
        raise definition.mistake(f"the name {what}", "", "give it another name")
    check_options(definition, frozenset({"name"}))
    check_names(definition, "takes", STAGES, "the stages it can start from")
    if cls.leaves not in (*STAGES, None):
        near = nearest(str(cls.leaves), STAGES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise definition.mistake(
            f"leaves: unknown stage {cls.leaves!r}{hint}", "leaves", f"known: {', '.join(STAGES)}"
        )
    check_defined(definition, ("call",), "which rewrites the graph")
    for hook in ("requires", "call", "ensures"):
        check_call(definition, hook, ("graph",))


PASSES: Registry[type[Pass]] = Registry(
    "pass", "adaptc.passes.factor", "adaptc.passes.fold", "adaptc.passes.lower", check=_check
)
"""Every pass, shipped or of an installed package, by the name a spec calls it by. See `catalog` for those that insert
and quantize."""

P = TypeVar("P", bound=type[Pass])


def graph_pass(name: str) -> Callable[[P], P]:
    """Register a pass under the name a spec calls it by.

    Raises:
        DefinitionError: the name is not kebab-case or another author's, or the class is no pass that can run; names
            the line.
    """
    return PASSES.register(name)


def check_order(passes: Sequence[Pass], stage: str = "traced") -> str | None:
    """The first pass that cannot start from the stage it finds, in words; None if the order is right."""
    for item in passes:
        if stage not in item.takes:
            wanted = " or ".join(s for s in STAGES if s in item.takes)
            return f"{item.name} takes a graph that is {wanted}, but finds one that is {stage}"
        stage = item.leaves or stage
    return None


def run(
    graph: Graph,
    passes: Iterable[Pass],
    records: list[PassRecord] | None = None,
    after: Callable[[str, Graph], Any] | None = None,
) -> Graph:
    """Run passes in the order written, on a copy, checking each.

    Args:
        graph: left as it is.
        passes: the pipeline.
        records: what each pass did is appended here.
        after: called with the pass's name and the graph after each pass.

    Raises:
        RefusedError: a pass refuses the graph.
        VerifyError: a pass left a graph that is not legal, or not what it ensures.
    """
    graph = graph.copy()
    done: list[str] = []
    for item in passes:
        if not isinstance(item, Pass):
            raise TypeError(f"expected a pass such as adaptc.passes.Fold(), got {item!r}")
        wrong = check_order([item], graph.stage)
        if wrong:
            raise RefusedError([Refusal(wrong)], item)
        refusals = item.requires(graph)
        if refusals:
            raise RefusedError(refusals, item)
        start, before = time.perf_counter(), len(graph.module.graph.nodes)
        try:
            modified = item.call(graph)
            graph.stage = item.leaves or graph.stage
            graph.clean()
            broken = item.ensures(graph)
            if broken:
                raise VerifyError(broken)
            verify(graph)
        except AdaptcError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {error}\n  at {where.filename}:{where.lineno}    {where.line}"
            raise VerifyError(_said(item.name, done, words)) from error
        done.append(item.name)
        seconds = time.perf_counter() - start
        if records is not None:
            records.append(PassRecord(item.name, seconds, before, len(graph.module.graph.nodes), modified))
        if after is not None:
            after(item.name, graph)
    return graph


def _said(name: str, done: list[str], message: str) -> str:
    return f"pass {name} failed (after {', '.join(done) or 'no other'}): {message}"
