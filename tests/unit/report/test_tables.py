from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from flashvaed_cli.report.tables import Column, TableData, to_markdown, to_rich

TABLE = TableData(
    "Speed",
    (Column("decoder", align="left"), Column("FPS", ".2f"), Column("parameters", ",d")),
    (("a|b [red]", 12.345, 1234567), ("flash", None, 10), ("broken", math.inf, 0)),
)


def terminal_text(table: TableData) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(to_rich(table))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown() -> None:
    assert to_markdown(TABLE) == (
        "## Speed\n"
        "\n"
        "| decoder    |   FPS | parameters |\n"
        "| ---------- | ----: | ---------: |\n"
        "| a\\|b [red] | 12.35 |  1,234,567 |\n"
        "| flash      |     – |         10 |\n"
        "| broken     |     ∞ |          0 |\n"
    )
    assert to_markdown(TABLE, heading="").startswith("| decoder")


def test_terminal_and_markdown_show_the_same_texts() -> None:
    shown = terminal_text(TABLE)
    assert "Speed" in shown
    for texts in TABLE.texts():
        assert all(text in shown for text in texts)  # brackets are no markup


def test_an_empty_table_is_still_a_table() -> None:
    empty = TableData("", (Column("x"),), ())
    assert to_markdown(empty) == "|   x |\n| --: |\n"
    assert "x" in terminal_text(empty)


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 columns, a row has 1"):
        TableData("t", (Column("a"), Column("b")), (("x",),))
