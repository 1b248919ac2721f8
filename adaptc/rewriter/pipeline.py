"""Passes, and the runner that checks them: requires, call, ensures, then the stage's legality table."""

from __future__ import annotations

import dataclasses
import re
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter

from adaptc.errors import AdaptcError, Refusal, RefusedError, VerifyError, nearest
from adaptc.ir.graph import Graph
from adaptc.ir.stages import REWRITTEN, STAGES
from adaptc.ir.verify import structure_checked, verify
from adaptc.registry.author import Author
from adaptc.registry.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.registry.registry import Registry


class Pass:
    """A transformation of a graph. Subclasses are frozen dataclasses whose fields are the options.

    A pass rewrites the graph it is given in place; the runner hands it a copy of the user's.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset(REWRITTEN)
    """The stages it can start from."""
    leaves: ClassVar[str | None] = None
    """The stage it leaves; None where it does not change it."""
    changes_results: ClassVar[bool] = False
    """Whether the graph it leaves may compute something else, beyond rounding in another order."""

    def stated(self) -> dict[str, Any]:
        """The options that differ from their defaults, as a spec states them."""
        return changed_options(self)

    def requires(self, graph: Graph) -> list[Refusal]:
        """Why this graph cannot be rewritten; empty if it can."""
        return []

    def call(self, graph: Graph) -> bool:
        """Rewrite the graph; True if anything changed."""
        raise NotImplementedError

    def ensures(self, graph: Graph) -> str | None:
        """What does not hold afterwards though it must, or None."""
        return None


def changed_options(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as plain data."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(instance) if dataclasses.is_dataclass(instance) else ():
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
        if getattr(instance, field.name) != default:
            options[field.name] = getattr(instance, field.name)
    return TypeAdapter(dict[str, Any]).dump_python(options, mode="json")


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: for the manifest and the screen."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    change: str = ""
    """By how much it changed what the model computes, of a pass that is not adaptc's and says that it does."""


Compare = Callable[[Pass, Graph], str]
"""Given a pass and the graph that it has rewritten, as it was before: by how much it changes results, in words; ""
where it does not. Raises RefusedError where it does not say so."""
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


def is_shipped(item: Pass) -> bool:
    """Whether what a pass does was written for adaptc, as for what inserts a method of a user's own too."""
    return type(item).call.__module__.startswith("adaptc.")


def run(
    graph: Graph,
    passes: Iterable[Pass],
    records: list[PassRecord] | None = None,
    after: Callable[[str, Graph], Any] | None = None,
    compare: Compare | None = None,
) -> Graph:
    """Run passes in the order written, on a copy, checking each.

    Args:
        graph: left as it is.
        passes: the pipeline.
        records: what each pass did is appended here.
        after: called with the pass's name and the graph after each pass.
        compare: asked by how much a pass that is not adaptc's own changes results, see `changes.comparison`; where
            there is none, weights are not there to run the graph with.

    Raises:
        RefusedError: a pass refuses the graph, or changes results and does not say so.
        VerifyError: a pass left a graph that is not legal, or not what it ensures; names the pass, those before it
            and the lines of the graph where it is.
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
        given = graph.copy() if compare is not None and not is_shipped(item) else None
        start, before = time.perf_counter(), len(graph.module.graph.nodes)
        modified = _rewritten(graph, item, done)
        done.append(item.name)
        seconds = time.perf_counter() - start
        change = compare(item, given) if compare is not None and given is not None else ""
        if records is not None:
            nodes = len(graph.module.graph.nodes)
            records.append(PassRecord(item.name, seconds, before, nodes, modified, change))
        if after is not None:
            after(item.name, graph)
    return graph


def _rewritten(graph: Graph, item: Pass, done: Sequence[str]) -> bool:
    """Let a pass rewrite the graph, and check what it leaves; True if it changed anything."""
    try:
        modified = item.call(graph)
        graph.stage = item.leaves or graph.stage
        with structure_checked():
            graph.clean()
        broken = item.ensures(graph)
        if broken:
            raise VerifyError(broken)
        verify(graph)
        return modified
    except VerifyError as error:
        raise _failure(graph, item, done, error) from error
    except AdaptcError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = VerifyError(
            f"{type(error).__name__}: {error}", f"at {where.filename}:{where.lineno}    {where.line}"
        )
        raise _failure(graph, item, done, cause) from error


def _failure(graph: Graph, item: Pass, done: Sequence[str], cause: VerifyError) -> VerifyError:
    """What went wrong in which pass, after which others, and the graph around the node: the one that the message names
    as `%name` if the cause names none.
    """
    node = cause.node or next(iter(re.findall(r"%(\w+)", cause.message)), "")
    excerpt = graph.excerpt(node).splitlines()
    shown = [f"the graph around %{node}:", *excerpt] if excerpt else []
    before = ", ".join(done) or "no other"
    message = f"pass {item.name} failed (after {before}): {cause.message}"
    return VerifyError(message, *cause.notes, *shown, node=node)
