"""What every stage returns: the files it wrote, a table for people and data for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from flashvaed_cli.printable import printable
from flashvaed_cli.report.tables import TableData, to_rich


@dataclass(frozen=True)
class StageOutcome:
    """Result of one command. `figures` is what `--json` prints; `notes` follow the tables.

    `details` are tables for `--verbose`; `next_commands` are suggestions, shown at the very end. `is_new` is False if
    an earlier run wrote the files.
    """

    paths: tuple[Path, ...]
    tables: tuple[TableData, ...]
    figures: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: tuple[TableData, ...] = ()
    next_commands: tuple[str, ...] = ()
    is_new: bool = True

    def table(self) -> RenderableType:
        """All tables, one below the other, then the notes."""
        return Group(*(to_rich(table) for table in self.tables), *(Text(printable(note)) for note in self.notes))

    def detailed(self) -> RenderableType:
        """The tables that `--verbose` adds."""
        return Group(*(to_rich(table) for table in self.details))

    def as_dict(self) -> Mapping[str, object]:
        """The figures."""
        return {**self.figures, "notes": list(self.notes)} if self.notes else self.figures
