"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeVar

import adaptc
from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES

ROOT = Path(__file__).parents[1]
CORE = sorted(p for p in (ROOT / "adaptc").rglob("*.py") if "passes" not in p.relative_to(ROOT).parts)
PASSES = sorted((ROOT / "passes").rglob("*.py"))
ALL = [*CORE, *PASSES]
MAY_NAME_METHODS = {"starter.py": "it writes an example spec, which needs a method"}
Node = TypeVar("Node", bound=ast.AST)
ENGLISH = {"full", "reward", "probe", "parallel", "prefix", "prompt", "bottleneck"}
"""Methods whose names are words: only a literal that is nothing but the name counts, and no variable."""


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, "adaptc")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(path: Path, everywhere: bool = True) -> Iterator[tuple[str, int]]:
    """What a file imports; without `everywhere`, only what it imports when it is itself imported."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not everywhere and (
                is_type_checking(child)
                or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            ):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def test_there_is_something_to_read() -> None:
    assert len(CORE) > 20
    assert len(PASSES) > 5


# imports

LAYERS = (
    ("errors", "progress"),
    ("patterns", "registry", "inputs", "weights", "optional", "html_table"),
    ("methods",),
    ("quantization",),
    ("spec",),
    ("ir",),
    ("checkpoints",),
    ("tracing",),
    ("rewriter",),
    ("arithmetic",),
    ("emit",),
    ("generation",),
    ("compiler",),
    ("products",),
    ("training", "losses"),
    ("cli",),
    ("__init__", "__main__"),
)
"""The rooms of `adaptc/`, lowest first. Each imports from lower rows, or from itself: at import time, under
TYPE_CHECKING and inside functions alike."""
NEVER = (
    ("ir", "spec"),
    ("rewriter", "tracing"),
    ("rewriter", "spec"),
    ("rewriter", "checkpoints"),
    ("emit", "spec"),
)
"""Rooms that have nothing to say to one another, although the order would allow it."""
WITHIN = {"ir": ("nodes", "analysis")}
"""The first parts of a room know only those before them: `ir.analysis` reads nodes, never a graph."""
LOW = frozenset({"rewriter", "ir", "methods", "quantization", "weights", "errors", "patterns"})
PASSES_MAY_IMPORT = {
    "insert": frozenset({"methods", "patterns", "errors"}),
    "quantize": frozenset({"quantization", "errors"}),
    "stored": frozenset({"quantization", "weights", "errors"}),
    "factor": LOW,
    "fold": LOW,
    "lower": LOW,
}
"""What a file of each folder of `passes/` may import of `adaptc/`; never another pass."""


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in ALL}


@cache
def needs() -> dict[str, dict[str, int]]:
    """Module -> the modules of ours it imports anywhere in its file, and the line."""
    found: dict[str, dict[str, int]] = {}
    for name, path in modules().items():
        found[name] = {}
        for other, line in imported(path):
            if other in modules() and other != name:
                found[name].setdefault(other, line)
    return found


def room(module: str) -> str:
    """`adaptc.spec.source` is in `spec`, `adaptc` itself is `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def breaches(needs: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Imports that point upwards, or between rooms that should not meet."""
    row = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = []
    for module, others in needs.items():
        here = room(module)
        if here == "passes":
            continue
        for other, line in others.items():
            there = room(other)
            if there in ("__init__", here) or (here, there) == ("__init__", "passes"):
                continue
            if there not in row or here not in row:
                found.append(f"{module}:{line} imports {other}: {here} or {there} has no row in LAYERS")
            elif row[there] >= row[here] or (here, there) in NEVER:
                found.append(f"{module}:{line} imports {other}")
    return found


def circles(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import one another, in a circle; empty where there is none."""
    try:
        TopologicalSorter({name: set(others) for name, others in needs.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_layers() -> None:
    assert not breaches(needs())


def test_no_circles() -> None:
    assert not circles(needs())


def test_the_law_of_layers_has_teeth() -> None:
    """An arrow upwards, between rooms that never meet, from a room without a row, and a circle are all found."""
    assert breaches({"adaptc.errors": {"adaptc.spec.source": 1}})
    assert breaches({"adaptc.rewriter.pipeline": {"adaptc.spec.spec": 1}})
    assert breaches({"adaptc.attic.box": {"adaptc.errors": 1}})
    assert not breaches({"adaptc.spec.source": {"adaptc.errors": 1}})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circles({"a": {"b"}, "b": {"c"}, "c": set[str]()})


def test_analysis_reads_nodes_and_no_graph() -> None:
    for module, others in needs().items():
        if not module.startswith("adaptc.ir."):
            continue
        parts = [[*m.split("."), "__init__"][2] for m in (module, *(o for o in others if room(o) == "ir"))]
        if parts[0] in WITHIN["ir"]:
            allowed = WITHIN["ir"][: WITHIN["ir"].index(parts[0]) + 1]
            assert set(parts[1:]) <= {*allowed, "__init__"}, f"{module} imports {parts[1:]}"


def test_rooms_of_the_compiler() -> None:
    """Proofs know no plan, plans no alternatives, and no one an artifact but what is above them all."""
    order = ("proof", "plan", "alternatives", "artifacts")
    found: list[str] = []
    for module, others in needs().items():
        _, _, here, *_ = [*module.split("."), "", ""]
        if module.startswith("adaptc.compiler.") and here in order:
            later = tuple(f"adaptc.compiler.{name}." for name in order[order.index(here) + 1 :])
            found += [f"{module} imports {other}" for other in others if other.startswith(later or ("-",))]
    assert not found


def test_passes_by_folder() -> None:
    breaches = []
    for module, others in needs().items():
        folder = module.removeprefix("adaptc.passes.").partition(".")[0]
        if folder in PASSES_MAY_IMPORT and module.count(".") > 2:
            rooms = {room(other) for other in others} - {"__init__"}
            breaches += [f"{module} imports {name}" for name in rooms - PASSES_MAY_IMPORT[folder]]
    assert not breaches


def imports_like(paths: Iterable[Path], pattern: str) -> list[str]:
    """The imports whose names start as the pattern says, by file and line."""
    return [
        f"{shown(path)}:{line} imports {name}"
        for path in paths
        for name, line in imported(path)
        if re.match(pattern, name)
    ]


def test_the_compiler_imports_no_pass() -> None:
    compiler = [path for path in CORE if shown(path) != "adaptc/__init__.py"]
    assert not imports_like(compiler, r"(adaptc\.)?passes(\.|$)"), "ask the registry for it"


def test_passes_import_the_compiler_only() -> None:
    assert not imports_like(PASSES, r"\."), "relative imports"
    assert not imports_like(PASSES, r"passes(\.|$)"), "passes are imported as adaptc.passes"
    files = [path for path in PASSES if path.name != "__init__.py"]
    assert not imports_like(files, r"adaptc\.passes"), "what passes share belongs to adaptc"


HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnx_ir", "safetensors", "peft"}
LIGHT = (
    *(
        "adaptc",
        "adaptc.cli.app",
        "adaptc.cli.commands",
        "adaptc.errors",
        "adaptc.patterns",
        "adaptc.inputs",
        "adaptc.spec.*",
    ),
    *("adaptc.methods.*", "adaptc.registry.registry", "adaptc.quantization.scheme"),
    *("adaptc.passes.insert.*", "adaptc.passes.quantize.*"),
)
"""What `adaptc --help`, `methods` and `schema` need: importing it imports no torch, and nothing as heavy."""


def heavy_imports(module: str, seen: set[str]) -> Iterator[str]:
    """The heavy packages that importing a module imports, through modules of ours too, as chains of imports."""
    seen.add(module)
    for name, line in imported(modules()[module], everywhere=False):
        if name.split(".")[0] in HEAVY:
            yield f"{module}:{line} imports {name}"
        if name in modules() and name not in seen:
            yield from (f"{module}:{line}, {chain}" for chain in heavy_imports(name, seen))


def test_no_torch_before_it_is_needed() -> None:
    chains = []
    for pattern in LIGHT:
        matched = [name for name in modules() if fnmatch.fnmatchcase(name, pattern)]
        assert matched, f"{pattern} matches nothing: take it off the list"
        chains += [chain for module in matched for chain in heavy_imports(module, set())]
    assert not chains


def test_adaptc_passes_is_a_link() -> None:
    link = ROOT / "adaptc" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


def test_every_public_name_is_there() -> None:
    assert all(getattr(adaptc, name) is not None for name in adaptc.__all__)
    assert adaptc.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_folder_is_packaged() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module_name(path.parent / "__init__.py") for path in ALL}
    assert folders <= set(declared), f"not in pyproject.toml: {sorted(folders - set(declared))}"
    for folder in {path.parent for path in ALL}:
        assert (folder / "__init__.py").is_file(), shown(folder)


# names


def docstrings(module: ast.Module) -> set[int]:
    """The identities of the nodes that are docstrings, of attributes too."""
    found = set()
    for node in ast.walk(module):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.add(id(statement.value))
    return found


def names_of_methods(path: Path, methods: set[str]) -> Iterator[str]:
    module = tree(path)
    skip = docstrings(module)
    for node in ast.walk(module):
        words: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            words = [
                name
                for name in methods
                if node.value == name
                or (name not in ENGLISH and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", node.value))
            ]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            words = [name for name in methods if node.name.lower() == name.replace("-", "_")]
        elif isinstance(node, ast.Name):
            words = [name for name in methods - ENGLISH if node.id.lower() == name.replace("-", "_")]
        for word in words:
            yield f"line {node.lineno}: {word!r}"  # type: ignore[attr-defined]


def test_the_compiler_knows_no_method_by_name() -> None:
    named = [
        f"{shown(path)}, {place}"
        for path in CORE
        if path.name not in MAY_NAME_METHODS
        for place in names_of_methods(path, {*METHODS, *SCHEMES})
    ]
    assert not named


def test_the_check_of_names_finds_some(tmp_path: Path) -> None:
    """The rule has teeth: each of these is found, and a docstring or `fullgraph` is not."""
    path = tmp_path / "bad.py"
    path.write_text(
        '"""About lora."""\nif kind == "lora":\n    pass\nx = f"insert-dora"\nkind = "full"\nok = "a full trace"\n'
        'fullgraph = True\ny = {"ia3": 1}\n\n\ndef lora() -> None:\n    """Of ia3."""\n'
    )
    found = list(names_of_methods(path, {"lora", "dora", "ia3", "full"}))
    assert sorted(found) == [
        "line 11: 'lora'", "line 2: 'lora'", "line 4: 'dora'", "line 5: 'full'", "line 8: 'ia3'",
    ]  # fmt: skip


# style that a linter does not hold


def test_files_are_short() -> None:
    lines = {shown(path): len(path.read_text().splitlines()) for path in ALL if path.name != "__init__.py"}
    longest = max(lines, key=lambda name: lines[name])
    assert lines[longest] <= 400, f"{longest} has {lines[longest]} lines"
    assert statistics.median(lines.values()) <= 170


LINES = 60
"""The most lines of a function, its docstring left out."""


def test_functions_are_short() -> None:
    long = []
    for place, function in nodes_of(ast.FunctionDef):
        first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
        if (function.end_lineno or 0) - first.lineno + 1 > LINES:
            long.append(f"{place}: {function.name}")
    assert not long


VAGUE = {"found", "known", "kept", "own", "words", "tmp", "res", "obj", "stuff"}
"""Names that say how a thing came about, or nothing; a name says what the thing is."""


def test_names_say_what_a_thing_is() -> None:
    names = [(place, name.id) for place, name in nodes_of(ast.Name) if isinstance(name.ctx, ast.Store)]
    names += [(place, argument.arg) for place, argument in nodes_of(ast.arg)]
    names += [(place, function.name) for place, function in nodes_of(ast.FunctionDef)]
    assert not [f"{place}: {name}" for place, name in names if name.strip("_") in VAGUE]


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from undocumented(child, prefix)
        if not isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) or child.name.startswith("_"):
            continue
        if not ast.get_docstring(child):
            yield f"line {child.lineno}: {prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{child.name}.")


def test_what_is_public_is_documented() -> None:
    missing = [shown(path) for path in ALL if not ast.get_docstring(tree(path))]
    missing += [f"{shown(path)}, {definition}" for path in ALL for definition in undocumented(tree(path))]
    assert not missing


def nodes_of(kind: type[Node]) -> Iterator[tuple[str, Node]]:
    """Every node of a kind in the source, and its file and line."""
    for path in ALL:
        for node in ast.walk(tree(path)):
            if isinstance(node, kind):
                yield f"{shown(path)}:{node.lineno}", node  # type: ignore[attr-defined]


def test_no_error_is_swallowed() -> None:
    breaches = []
    for place, handler in nodes_of(ast.ExceptHandler):
        silent = all(
            isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in handler.body
        )
        if handler.type is None or silent:
            breaches.append(place)
    assert not breaches


def test_nothing_is_printed_and_no_code_is_run_from_data() -> None:
    breaches = []
    for place, call in nodes_of(ast.Call):
        function = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        unsafe = function in ("print", "eval", "exec", "pickle.load", "yaml.load")
        if unsafe or (function == "torch.load" and given.get("weights_only") != "True"):
            breaches.append(f"{place}: {function}")
    assert not breaches


THEMES = {"laws", "parity", "golden", "messages", "replay", "plugin", "docs", "data", "examples"}
"""What tests are about that no room is about by itself; `laws` hold over a whole registry."""


def test_tests_lie_where_what_they_test_lies() -> None:
    rooms = {path.parent.name for path in (ROOT / "adaptc").glob("*/__init__.py")} | {"passes"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders <= rooms | THEMES
    for room in folders & rooms:
        source = ROOT / ("passes" if room == "passes" else f"adaptc/{room}")
        below = {path.name for path in source.rglob("*") if path.is_dir()}
        parts = {part.name for part in (ROOT / "tests" / room).rglob("*") if part.is_dir()}
        assert parts - {"__pycache__"} <= below, f"tests/{room} has folders that {shown(source)} has not"


def test_every_method_has_a_file_and_a_spec() -> None:
    known = {**METHODS, **SCHEMES}
    for name, cls in known.items():
        if not cls.__module__.startswith("adaptc.passes."):
            continue
        assert (ROOT / "specs" / f"{name}.yaml").is_file(), f"specs/{name}.yaml"
    per_file = [cls.__module__ for cls in known.values()]
    assert len(per_file) == len(set(per_file)), "one method a file"
