"""`flashvaed info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.info import InfoRecipe
from flashvaed_cli.stages.common.loading import choose_input
from flashvaed_cli.stages.info.facts import FileFacts, gather
from flashvaed_cli.stages.info.show import show_one, show_side_by_side


@dataclass(frozen=True)
class InfoOutcome:
    """The facts of all files; nothing is written.

    `failed`: the files that could not be described, each with the reason.
    """

    files: tuple[FileFacts, ...]
    size: str
    failed: tuple[tuple[str, str], ...] = ()
    paths: tuple[Path, ...] = ()

    def table(self) -> RenderableType:
        """All about one file, or what differs between several."""
        if len(self.files) == 1:
            return show_one(self.files[0], self.size)
        return show_side_by_side(self.files, self.size)

    def as_dict(self) -> Mapping[str, object]:
        """Every fact of every file, in the order given."""
        return {
            "kind": "flashvaed-info",
            "schema": 1,
            "size": self.size,
            "files": [facts.document() for facts in self.files],
            "failed": [{"file": location, "message": reason} for location, reason in self.failed],
        }


def run_info(recipe: InfoRecipe, *, progress: Progress, force: bool, command_line: str) -> InfoOutcome:
    """Describe every file that can be described.

    Raises:
        ArtifactError: none can: not found, not readable, or of a kind that flashvaed does not know.
    """
    locations = recipe.files or (choose_input(None, InfoRecipe, progress),)
    files: list[FileFacts] = []
    failed: list[tuple[str, str]] = []
    for location in locations:
        try:
            files.append(gather(location, recipe, progress))
        except (ArtifactError, SpecError) as error:
            if len(locations) == 1:
                raise
            failed.append((location, str(error)))
    if not files:
        raise ArtifactError("\n".join(reason for _, reason in failed))
    return InfoOutcome(tuple(files), recipe.size, tuple(failed))
