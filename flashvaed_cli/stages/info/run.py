"""`flashvaed info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.info import InfoRecipe
from flashvaed_cli.stages.common.loading import choose_input
from flashvaed_cli.stages.info.facts import FileFacts, gather
from flashvaed_cli.stages.info.show import show_one, show_side_by_side


@dataclass(frozen=True)
class InfoOutcome:
    """What was found; nothing is written."""

    files: tuple[FileFacts, ...]
    size: str
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
        }


def run_info(recipe: InfoRecipe, *, progress: Progress, force: bool, command_line: str) -> InfoOutcome:
    """Describe every file.

    Raises:
        ArtifactError: a file cannot be found or read, or is of a kind that flashvaed does not know.
    """
    locations = recipe.files or (choose_input(None, InfoRecipe, progress),)
    return InfoOutcome(tuple(gather(location, recipe, progress) for location in locations), recipe.size)
