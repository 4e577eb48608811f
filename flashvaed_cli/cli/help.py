"""Help for terminals that are too narrow for rich's boxes: the same headings, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMON_PANEL = "Common"
"""The last heading, for the flags that most commands have."""

_LONGEST_FLAG = 26
"""Width of the flag column; descriptions of longer flags begin on the next line."""

_COLUMN_GAP = " — "


def table(rows: Mapping[Any, str]) -> list[str]:
    """Epilog paragraphs that plain help shows as two columns, and rich help line by line."""
    return [f"{term}{_COLUMN_GAP}{text}" for term, text in rows.items()]


class GroupedCommand(TyperCommand):
    """A command whose plain help groups its options under the same headings as rich's help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options heading by heading."""
        options: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                is_argument = parameter.param_type_name == "argument"
                own = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
                options.setdefault(own or (COMMON_PANEL if parameter.name == "help" else "Options"), []).append(record)
        _write(formatter, options)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write paragraphs wrapped, command lines as typed, and table rows in two columns."""
        for kind, paragraphs in groupby((self.epilog or "").split("\n\n"), key=_kind_of_paragraph):
            formatter.write_paragraph()
            with formatter.indentation():
                if kind == "row":
                    formatter.write_dl([tuple(paragraph.split(_COLUMN_GAP)) for paragraph in paragraphs])
                elif kind == "command":
                    formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in paragraphs))
                else:
                    formatter.write_text("\n\n".join(paragraphs))


def _kind_of_paragraph(text: str) -> str:
    return "row" if _COLUMN_GAP in text else "command" if text.startswith("flashvaed ") else "text"


class GroupedProgram(TyperGroup):
    """A program whose plain help groups its commands under the same headings as rich's help, with a sentence each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands heading by heading."""
        commands: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            sentence = " ".join((command.help or "").split("\n\n")[0].split())
            commands.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, sentence))
        _write(formatter, commands)


def _write(formatter: Any, rows_by_heading: dict[str, list[tuple[str, str]]]) -> None:
    for heading, rows in rows_by_heading.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=_LONGEST_FLAG)
