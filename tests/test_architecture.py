"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import os
import re
import statistics
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from adaptc.method_contract import METHODS
from adaptc.scheme_contract import SCHEMES

ROOT = Path(__file__).parents[1]
CORE = sorted(p for p in (ROOT / "adaptc").rglob("*.py") if "passes" not in p.relative_to(ROOT).parts)
PASSES = sorted((ROOT / "passes").rglob("*.py"))
ALL = [*CORE, *PASSES]
MAY_NAME_METHODS = {"starter.py": "it writes an example spec, which needs a method"}
ENGLISH = {"full", "reward", "probe", "parallel", "prefix", "prompt", "bottleneck"}
"""Methods whose names are words: only a literal that is nothing but the name counts, and no variable."""
WITHOUT_TORCH = [
    "__init__",
    "adapt_entries",
    "author",
    "base_entry",
    "cli",
    "definitions",
    "emit_entries",
    "errors",
    "feed_forward",
    "inputs",
    "kinds",
    "low_rank",
    "method_contract",
    "names",
    "param",
    "peft_format",
    "point_sites",
    "ranked",
    "registry",
    "rule",
    "schema",
    "scheme_contract",
    "site",
    "source",
    "sparse",
    "spec",
    "spec_errors",
    "spec_part",
    "starter",
    "targets",
    "trial",
    "yaml_text",
]


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


@pytest.mark.parametrize("path", CORE, ids=shown)
def test_the_compiler_imports_no_pass(path: Path) -> None:
    if shown(path) == "adaptc/__init__.py":
        return
    found = [(name, line) for name, line in imported(path) if re.match(r"(adaptc\.)?passes(\.|$)", name)]
    assert not found, f"{shown(path)} imports {found}; ask the registry for it"


@pytest.mark.parametrize("path", PASSES, ids=shown)
def test_passes_import_the_compiler_only(path: Path) -> None:
    names = list(imported(path))
    assert not [n for n in names if n[0].startswith(".")], "relative imports"
    assert not [n for n in names if re.match(r"passes(\.|$)", n[0])], "passes are imported as adaptc.passes"
    if path.name != "__init__.py":
        found = [n for n in names if n[0].startswith("adaptc.passes")]
        assert not found, f"a pass imports another: {found}; what they share belongs to adaptc"


@pytest.mark.parametrize("path", sorted((ROOT / "passes/insert").glob("*.py")), ids=shown)
def test_methods_hold_maths_only(path: Path) -> None:
    allowed = {
        f"adaptc.{n}"
        for n in (
            *(
                "method_contract",
                "kinds",
                "param",
                "site",
                "point_sites",
                "errors",
                "peft_format",
                "rule",
                "names",
            ),
            *("low_rank", "ranked", "sparse", "feed_forward"),
        )
    }
    ours = {name for name, _ in imported(path) if name.startswith("adaptc")}
    known = {name for name in ours if any(name == a or name.startswith(a + ".") for a in allowed)}
    assert ours <= known, f"{shown(path)} imports {ours - known}"
    assert not [n for n, _ in imported(path, everywhere=False) if n.split(".")[0] == "torch"]


def test_no_circular_imports() -> None:
    """At import time modules form layers; what is imported inside a function may point upwards."""
    modules = {module_name(path): path for path in CORE}
    needs = {
        name: {other for other, _ in imported(path, everywhere=False) if other in modules and other != name}
        for name, path in modules.items()
    }
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, others in needs.items() if name not in done and others <= done}
        assert ready, f"import one another: {sorted(set(needs) - done)}"
        done |= ready


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_before_it_is_needed(name: str) -> None:
    path = ROOT / "adaptc" / f"{name}.py"
    if not path.exists():
        pytest.fail(f"{shown(path)} is gone: take it off the list")
    heavy = {"torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnx_ir", "safetensors", "peft"}
    found = [n for n, _ in imported(path, everywhere=False) if n.split(".")[0] in heavy]
    assert not found, f"{shown(path)} imports {found} at module level"


def test_adaptc_passes_is_a_link() -> None:
    link = ROOT / "adaptc" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


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


@pytest.mark.parametrize("path", CORE, ids=shown)
def test_the_compiler_knows_no_method_by_name(path: Path) -> None:
    if path.name in MAY_NAME_METHODS:
        return
    found = list(names_of_methods(path, {*METHODS, *SCHEMES}))
    assert not found, f"{shown(path)} names methods: {found}"


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


@pytest.mark.parametrize("path", ALL, ids=shown)
def test_what_is_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{shown(path)} has no docstring"
    assert not list(undocumented(tree(path)))


@pytest.mark.parametrize("path", ALL, ids=shown)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{shown(path)}:{node.lineno}: a bare except"
            silent = all(
                isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            assert not silent, f"{shown(path)}:{node.lineno}: an error is swallowed"


@pytest.mark.parametrize("path", ALL, ids=shown)
def test_errors_are_adaptcs_own(path: Path) -> None:
    """Nothing is printed, and no code from data is run, outside of the command line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), (
                f"{shown(path)}:{node.lineno}: {node.func.id}"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = ast.unparse(node.func.value)
            if owner in ("torch", "pickle", "yaml"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert owner == "torch", f"{shown(path)}:{node.lineno}: {owner}.load"
                assert given.get("weights_only") == "True", (
                    f"{shown(path)}:{node.lineno}: an unsafe torch.load"
                )


def test_every_method_has_a_file_and_a_spec() -> None:
    known = {**METHODS, **SCHEMES}
    for name, cls in known.items():
        if not cls.__module__.startswith("adaptc.passes."):
            continue
        assert (ROOT / "specs" / f"{name}.yaml").is_file(), f"specs/{name}.yaml"
    per_file = [cls.__module__ for cls in known.values()]
    assert len(per_file) == len(set(per_file)), "one method a file"
