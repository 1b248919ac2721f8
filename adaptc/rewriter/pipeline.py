"""Passes, and the runner that checks each: requires, call, ensures, then the table of what is legal at its stage."""

from __future__ import annotations

import dataclasses
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from pydantic import TypeAdapter

from adaptc.errors import AdaptcError, Refusal, RefusedError, VerifyError, unknown
from adaptc.ir.graph import Graph
from adaptc.ir.stages import REWRITTEN, STAGES
from adaptc.ir.verify import structure_checked, verify
from adaptc.progress.steps import step
from adaptc.registry.author import Author
from adaptc.registry.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.registry.registry import Registry

LOG = logging.getLogger(__name__)


class Pass:
    """A transformation of a graph. Subclasses are frozen dataclasses whose fields are the options.

    A pass rewrites a graph in place; the runner hands it a copy of the user's. See docs/writing-a-pass.md.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset(REWRITTEN)
    """The stages it can start from: a graph is `traced`, then `adapted`, then `factored` or `folded`."""
    leaves: ClassVar[str | None] = None
    """The stage of the graph after it; None if that is the stage before it."""
    changes_results: ClassVar[bool] = False
    """Whether it may change what the graph computes, by more than rounding in another order."""

    def stated(self) -> dict[str, Any]:
        """The options that differ from their defaults, as a spec states them."""
        return changed_options(self)

    def requires(self, graph: Graph) -> list[Refusal]:
        """Why this graph cannot be rewritten; empty if it can. Called before `call`."""
        return []

    def call(self, graph: Graph) -> bool:
        """Rewrite the graph in place.

        Returns:
            Whether anything changed.
        """
        raise NotImplementedError

    def ensures(self, graph: Graph) -> str | None:
        """What must hold of the graph after `call`, and does not; None if all holds."""
        return None


def changed_options(instance: object) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as data that YAML can hold."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(instance) if dataclasses.is_dataclass(instance) else ():
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if getattr(instance, field.name) != default:
            options[field.name] = getattr(instance, field.name)
    return TypeAdapter(dict[str, Any]).dump_python(options, mode="json")


@dataclass(frozen=True)
class PassRecord:
    """What a pass did, for the manifest and the screen.

    Attributes:
        name: the pass, as a spec calls it.
        seconds: the time it took, with the checks after it.
        nodes_before: how many nodes the graph had.
        nodes_after: how many it has.
        modified: what `call` returned.
        change: by how much it changed what the model computes; "" if not, or if it is adaptc's own and not measured.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    change: str = ""


Compare = Callable[[Pass, Graph], str]
"""Called with a pass and the graph before it: gives by how much the pass changes results, "" if not at all. Raises
RefusedError if it changes them and does not declare that it does."""
RESERVED = ("insert", "quantize", "all", "trace")
"""Words that a spec or an option of the command line has in the place of a pass's name."""


def _check(name: str, cls: Any, author: Author) -> None:
    base = Pass if isinstance(cls, type) and issubclass(cls, Pass) else None
    definition = check_class("pass", name, cls, base, "Pass", author)
    generated = name.startswith(("insert-", "quantize-"))
    if name in RESERVED or generated:
        meaning = (
            "inserts a method or quantizes by a scheme" if generated else "means something else in a spec"
        )
        raise definition.mistake(f"the name {meaning}", "", "give it another name")
    check_options(definition, frozenset({"name"}))
    check_names(definition, "takes", STAGES, "the stages it can start from")
    leaves = definition.cls.leaves
    if leaves not in (*STAGES, None):
        message = f"leaves: {unknown('stage', leaves, STAGES, listed=())}"
        raise definition.mistake(message, "leaves", f"known: {', '.join(STAGES)}")
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
    """A message about the first pass that cannot start from the stage it finds; None if the order is right."""
    for item in passes:
        if stage not in item.takes:
            wanted = " or ".join(s for s in STAGES if s in item.takes)
            return f"{item.name} takes a graph that is {wanted}, but finds one that is {stage}"
        stage = item.leaves or stage
    return None


def is_shipped(item: Pass) -> bool:
    """Whether the `call` of a pass is adaptc's own, as that of the pass that inserts a user's method."""
    return type(item).call.__module__.startswith("adaptc.")


def run(
    graph: Graph,
    passes: Iterable[Pass],
    records: list[PassRecord] | None = None,
    after: Callable[[str, Graph], object] | None = None,
    compare: Compare | None = None,
) -> Graph:
    """Run passes in the order written, on a copy, checking each.

    Args:
        graph: left as it is.
        passes: the pipeline.
        records: what each pass did is appended here.
        after: called after each pass with its name and the graph.
        compare: measures by how much a pass that is not adaptc's own changes results, see `compiler.changes`; None
            where there are no weights to run the graph with.

    Returns:
        The rewritten graph.

    Raises:
        RefusedError: a pass refuses the graph, or changes results without declaring it.
        VerifyError: a pass failed, or left a graph that is not legal or not what it ensures; the message names the
            pass and those before it, the notes quote the graph around the node at fault.
        TypeError: one of `passes` is not a pass.
    """
    graph = graph.copy()
    done: list[str] = []
    for item in passes:
        _check_is_pass(item)
        misplaced = check_order([item], graph.stage)
        if misplaced:
            raise RefusedError([Refusal(misplaced)], item)
        refusals = item.requires(graph)
        if refusals:
            raise RefusedError(refusals, item)
        original = graph.copy() if compare is not None and not is_shipped(item) else None
        before = len(graph.module.graph.nodes)
        with step(LOG, item.name, level=logging.DEBUG) as timed:
            modified = _rewritten(graph, item, done)
        done.append(item.name)
        seconds = timed.seconds
        change = compare(item, original) if compare is not None and original is not None else ""
        if records is not None:
            nodes = len(graph.module.graph.nodes)
            records.append(PassRecord(item.name, seconds, before, nodes, modified, change))
        if after is not None:
            after(item.name, graph)
    return graph


def _check_is_pass(item: object) -> None:
    if not isinstance(item, Pass):
        raise TypeError(f"expected a pass such as adaptc.passes.Fold(), got {item!r}")


def _rewritten(graph: Graph, item: Pass, done: Sequence[str]) -> bool:
    """Let a pass rewrite the graph, and check the result; gives whether the pass says that it changed anything."""
    try:
        modified = item.call(graph)
        if not isinstance(cast(object, modified), bool):
            raise VerifyError(f"call gives whether it changed anything, True or False; got {modified!r}")
        graph.stage = item.leaves or graph.stage
        with structure_checked():
            graph.clean()
        breach = item.ensures(graph)
        if breach:
            raise VerifyError(breach)
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
    """The error with the name of the pass, the passes before it, and the graph around the node at fault.

    Where the cause names no node, that is the first that its message names, as `%name`.
    """
    node = cause.node or next(iter(re.findall(r"%(\w+)", cause.message)), "")
    excerpt = graph.excerpt(node).splitlines()
    shown = [f"the graph around %{node}:", *excerpt] if excerpt else []
    before = ", ".join(done) or "no other"
    message = f"pass {item.name} failed (after {before}): {cause.message}"
    return VerifyError(message, *cause.notes, *shown, node=node)
