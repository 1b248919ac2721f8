"""Where a registered method, scheme or pass is written, so that messages can name the line."""

from __future__ import annotations

import ast
import linecache
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class Author:
    """Where a class or function was registered.

    Attributes:
        file: the path of the file, or the name Python gives a notebook's cell.
        line: the line of the decorator, or of the call that registers; counted from 1.
        module: the module's name.
        qualname: the name of the class or function inside its module.
    """

    file: str
    line: int
    module: str
    qualname: str

    @classmethod
    def of(cls, registered: Any, frame: FrameType) -> Author:
        """The author of a class or function that the code of a frame registers."""
        return cls(frame.f_code.co_filename, frame.f_lineno, registered.__module__, registered.__qualname__)

    @property
    def place(self) -> str:
        """`file:line` of the class statement, or of the call that registers it where there is none."""
        body = self._class()
        return f"{self.file}:{self.line if body is None else body.lineno}"

    def place_of(self, attribute: str) -> str:
        """`file:line` where the class defines an attribute; `place` where it does not."""
        body = self._class()
        for statement in body.body if body is not None else ():
            if attribute in _names(statement):
                return f"{self.file}:{statement.lineno}"
        return self.place

    def may_replace(self, earlier: Author) -> bool:
        """Whether this is a new version of an earlier definition: a cell was run again, or a module loaded again."""
        if (self.module, self.qualname) == (earlier.module, earlier.qualname):
            return True
        return self.file == earlier.file or self.module == earlier.module == "__main__"

    def _class(self) -> ast.ClassDef | None:
        """The class statement that the line belongs to; None where a call made the class, or there is no source."""
        source = "".join(linecache.getlines(self.file))
        try:
            module = ast.parse(source)
        except SyntaxError:
            return None
        name = self.qualname.rpartition(".")[2]
        statements = [
            node
            for node in ast.walk(module)
            if isinstance(node, ast.ClassDef)
            and node.name == name
            and _first_line(node) <= self.line <= node.lineno
        ]
        return statements[-1] if statements else None


def _first_line(node: ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _names(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a class's body defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def place_of_function(function: Callable[..., object]) -> str:
    """`file:line` of a function's definition; `an unknown place` of one that has no Python code."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "an unknown place"


def place_in(error: BaseException, function: Callable[..., object]) -> str:
    """`file:line    text` of the last line of a function's file that an error passed through.

    It is `file:line` of the function's definition where the error passed through none of that file's lines.
    """
    code = getattr(function, "__code__", None)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if code is not None and frame.filename == code.co_filename
    ]
    if not frames:
        return place_of_function(function)
    last = frames[-1]
    return f"{last.filename}:{last.lineno}" + (f"    {last.line}" if last.line else "")
