"""Where the author of a method, a scheme or a pass wrote something, so that messages can name the line."""

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
    """Where something was registered: a file, and the line of the decorator.

    Attributes:
        file: the file, or the cell of a notebook.
        line: the line of the decorator, or of the call that registers.
        module: the module's name.
        qualname: the name of the class or function inside its module.
    """

    file: str
    line: int
    module: str
    qualname: str

    @classmethod
    def of(cls, registered: Any, frame: FrameType) -> Author:
        """The author of what is registered from a frame."""
        return cls(frame.f_code.co_filename, frame.f_lineno, registered.__module__, registered.__qualname__)

    @property
    def place(self) -> str:
        """The file and line of the class's first line, or of the call that registers it."""
        body = self._class()
        return f"{self.file}:{self.line if body is None else body.lineno}"

    def place_of(self, attribute: str) -> str:
        """The file and line where the class states an attribute; that of the class where it does not."""
        body = self._class()
        for statement in body.body if body is not None else ():
            if attribute in _names(statement):
                return f"{self.file}:{statement.lineno}"
        return self.place

    def may_replace(self, earlier: Author) -> bool:
        """Whether this is another version of the same: the cell was run again, or the module was loaded again."""
        if (self.module, self.qualname) == (earlier.module, earlier.qualname):
            return True
        return self.file == earlier.file or self.module == earlier.module == "__main__"

    def _class(self) -> ast.ClassDef | None:
        """The class statement that holds the line; None where the class was made otherwise, or there is no source."""
        source = "".join(linecache.getlines(self.file))
        try:
            module = ast.parse(source)
        except SyntaxError:
            return None
        name = self.qualname.rpartition(".")[2]
        around = [
            node
            for node in ast.walk(module)
            if isinstance(node, ast.ClassDef)
            and node.name == name
            and _first_line(node) <= self.line <= node.lineno
        ]
        return around[-1] if around else None


def _first_line(node: ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _names(statement: ast.stmt) -> Iterator[str]:
    """What a statement of a class's body defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def place_of_function(function: Callable[..., Any]) -> str:
    """The file and line where a function is defined."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "an unknown place"


def place_in(error: BaseException, function: Callable[..., Any]) -> str:
    """The file, line and text where an error came out of a function's file; of its definition if from elsewhere."""
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
