"""One table, three forms: terminal, GitHub Markdown and plain data. All show the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from flashvaed_cli.printable import printable_line

Cell = str | int | float | None
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column and how its numbers look.

    Args:
        name: heading, with the unit.
        number_format: format spec of numbers, such as `.2f` or `,d`; text is shown as it is.
        align: numbers are aligned right.
        wraps: whether cells may wrap in a narrow terminal; None: text does, numbers do not.
    """

    name: str
    number_format: str = ".4g"
    align: Literal["left", "right"] = "right"
    wraps: bool | None = None


@dataclass(frozen=True)
class TableData:
    """A table as data. Every row has one cell per column; None is shown as a dash."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        """Refuse ragged rows."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, a row has {len(row)}: {row}")

    def texts(self) -> list[list[str]]:
        """All cells as they are shown."""
        return [
            [format_cell(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]


def format_cell(cell: Cell, column: Column) -> str:
    """Text of one cell. An integer in a column formatted for fractions is shown as an integer."""
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and not math.isfinite(cell):
        return "nan" if math.isnan(cell) else ("∞" if cell > 0 else "-∞")
    return format(cell, column.number_format)


def to_rich(table: TableData) -> Table:
    """For the terminal. Cells are plain text: square brackets in a file name are not markup."""
    view = Table(title=Text(table.title) if table.title else None, title_justify="left", header_style="bold")
    view.show_header = any(column.name for column in table.columns)
    for column in table.columns:
        # a number broken over two lines is unreadable, a name is not
        wraps = column.align == "left" if column.wraps is None else column.wraps
        overflow = "fold" if column.wraps else "ellipsis"
        view.add_column(Text(column.name), justify=column.align, no_wrap=not wraps, overflow=overflow)
    for texts in table.texts():
        view.add_row(*(Text(printable_line(text)) for text in texts))
    return view


def to_markdown(table: TableData, *, heading: str = "##") -> str:
    """For GitHub; columns padded so that the source reads as a table too. Ends with a newline.

    Args:
        table: what to show.
        heading: marks before the title; empty leaves the title out.
    """
    names = [_escape(column.name) for column in table.columns]
    body = [[_escape(text) for text in texts] for texts in table.texts()]
    widths = [max(3, *(len(row[i]) for row in [names, *body])) for i in range(len(names))]
    rights = [column.align == "right" for column in table.columns]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, rights, strict=True)]
    lines = [_line(names, widths, rights), _line(rule, widths, rights), *(_line(row, widths, rights) for row in body)]
    if heading and table.title:
        lines = [f"{heading} {table.title}", "", *lines]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str], widths: Sequence[int], rights: Sequence[bool]) -> str:
    cells = [
        text.rjust(width) if right else text.ljust(width)
        for text, width, right in zip(texts, widths, rights, strict=True)
    ]
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
