"""Tables that fit the screen: words stay whole, and where columns do not fit each row becomes a paragraph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2
"""The columns between two columns of a table."""


class Fitted:
    """Rows as a table, or as paragraphs where the longest words of the columns are wider than the screen together.

    Args:
        title: above it.
        columns: their names.
        rows: their cells.
        caption: below it; none if it is empty.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""):
        self.title, self.columns, self.rows, self.caption = title, columns, rows, caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        widths = column_widths([self.columns, *self.rows], options.max_width)
        if widths is None:
            yield from self._paragraphs()
        else:
            table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
            for name, width in zip(self.columns, widths, strict=True):
                table.add_column(Text(name), width=width, overflow="fold")
            for row in self.rows:
                table.add_row(*map(Text, row))
            yield table
        if self.caption:
            yield Text(self.caption, style="italic")
        yield Text()

    def _paragraphs(self) -> RenderResult:
        """Each row's first cell on a line, and below it the others by the names of their columns."""
        for first, *others in self.rows:
            yield Text(first)
            named = zip(self.columns[1:], others, strict=True)
            yield Padding(Text(", ".join(f"{name} {cell}" for name, cell in named if cell)), (0, 0, 0, 4))


def table(title: str, rows: Sequence[Mapping[str, object]], shown: Sequence[str] = ()) -> Fitted:
    """Rows that have the same keys, which are the columns.

    Args:
        title: above it.
        rows: at least one.
        shown: the keys to show; all of them if none are given.
    """
    columns = tuple(shown or rows[0])
    return Fitted(title, columns, [[str(row[column]) for column in columns] for row in rows])


def pairs(values: Mapping[str, object]) -> Table:
    """Names and values, a line each; a long value goes on beside its name."""
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in values.items():
        grid.add_row(Text(name, style="bold"), Text(str(value)))
    return grid


def labelled(lines: Sequence[str], width: int) -> Table:
    """Lines that begin with a label of `width` characters; what follows it stays to the right of the label."""
    grid = Table.grid()
    grid.add_column(width=width)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(Text(line[:width].rstrip()), Text(line[width:]))
    return grid


def show(*parts: object) -> None:
    """Print tables and texts on standard output."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part, markup=False)


def column_widths(rows: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """How wide the columns of a table are, so that no word is broken; None if they cannot be.

    Each column is as wide as its longest word, and shares in what is left by what its longest cell lacks.

    Args:
        rows: the cells, those of the header too.
        available: the width of the screen.
    """
    cells = list(zip(*rows, strict=True))
    least = [max(len(word) for cell in column for word in (cell.split() or [""])) for column in cells]
    most = [max(map(len, column)) for column in cells]
    left = available - sum(least) - GAP * len(cells)
    if left < 0:
        return None
    lacking = [wanted - width for wanted, width in zip(most, least, strict=True)]
    share = min(1.0, left / max(1, sum(lacking)))
    return [width + int(share * lack) for width, lack in zip(least, lacking, strict=True)]
