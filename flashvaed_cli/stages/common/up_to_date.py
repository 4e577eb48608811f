"""A finished result is neither made twice nor silently replaced.

The same command on unchanged files does nothing; on changed ones it makes its result again; a command with other
settings asks for another place. `--force` makes it again in any case.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashvaed_cli import __version__
from flashvaed_cli.artifact.run_record import DataFile
from flashvaed_cli.artifact.store import read_header, sha256_of
from flashvaed_cli.errors import ArtifactError, FlashVaedError
from flashvaed_cli.ownership import has_own_header, is_own_file
from flashvaed_cli.recipe.settings import CommandRecipe
from flashvaed_cli.stages.common.ancestry import Ancestor, find_lineage, find_parents, flat
from flashvaed_cli.stages.common.outputs import hashes_of
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run_watch import described_files

_NO_PART = ("output", "input")
"""Fields that are compared by the files that they name."""


def finished_artifact(
    output: Path, recipe: CommandRecipe, location: str, data: Callable[[], Iterable[Path]], *, force: bool
) -> StageOutcome | None:
    """The outcome of an earlier run of this command with these settings on these files; None if it is to be run.

    Args:
        output: an artifact, perhaps.
        location: of the input, chosen.
        data: finds the files that the recipe's `data` names now.
    Raises:
        FlashVaedError: the output is the finished result of another command, or of other settings.
    """
    if force or not output.is_file() or not has_own_header(output):
        return None
    try:
        header = read_header(output)
    except ArtifactError:
        return None  # damaged: make it again
    if not header.command_line or not header.recipe or header.run is None:
        return None  # an original, or written by an old version
    command = _command_of(header.command_line)
    recorded = {**header.recipe, "input": header.parents[0].location if header.parents else None}
    _require_same(output, (command, recorded), recipe, location, header.command_line)
    is_old = header.tool != __version__ or not _are_unchanged(find_parents(header, str(output)))
    if is_old or not _data_unchanged(header.run.data, header.run.started, data):
        return None
    return StageOutcome((output,), (), header.measured, (_note(output),), is_new=False)


def provenance(recipe: CommandRecipe, inputs: Mapping[str, str], data: Sequence[Path]) -> dict[str, Any]:
    """How a report or a manifest was made, for `finished_folder`.

    Args:
        inputs: SHA-256 by location, the main one first.
        data: the clips that were read.
    """
    return {
        "tool": __version__,
        "command": recipe.command,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": dict(inputs),
        "data": [file.model_dump() for file in described_files(data)],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def finished_folder(
    marker: Path, recipe: CommandRecipe, location: str, data: Callable[[], Iterable[Path]], *, force: bool
) -> StageOutcome | None:
    """`finished_artifact` for a folder; its `marker` holds the figures, and the `provenance` under `made_with`."""
    if force or not marker.is_file() or not is_own_file(marker):
        return None
    document = json.loads(marker.read_bytes())
    made = document.get("made_with")
    if not isinstance(made, dict):
        return None
    try:
        recorded = {**made["recipe"], "input": next(iter(made["inputs"]))}
        command_line = str(document.get("command") or document["settings"]["command"])
        files = tuple(DataFile.model_validate(file) for file in made["data"])
        is_old = made["tool"] != __version__ or not _inputs_unchanged(made["inputs"], marker)
        started = str(made["started"])
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None
    _require_same(marker.parent, (str(made.get("command")), recorded), recipe, location, command_line)
    hashes = document.get("sha256_of_files")
    if isinstance(hashes, dict) and not hashes.items() <= hashes_of(marker.parent).items():
        return None
    if is_old or not _data_unchanged(files, started, data):
        return None
    return StageOutcome((marker,), (), document, (_note(marker.parent),), is_new=False)


def _note(place: Path) -> str:
    return f"{place} is up to date: the same command, and nothing that it reads has changed. --force makes it again."


def _require_same(
    place: Path, made: tuple[str, Mapping[str, Any]], recipe: CommandRecipe, location: str, command_line: str
) -> None:
    command, recorded = made
    asked = recipe.model_dump(mode="json")
    differing = [key for key in asked if key not in _NO_PART and recorded.get(key) != asked[key]]
    if command == recipe.command and recorded["input"] == location and not differing:
        return
    named = ""
    if command == recipe.command:
        named = f" ({', '.join(differing) or 'input'} differ{'s' if len(differing) < 2 else ''})"
    shown = command_line if len(command_line) < 200 else f"{command_line[:200]} ..."
    raise FlashVaedError(
        f"{place} is the finished result of `{shown}`{named}. Give another --output, or replace it with --force."
    )


def _command_of(command_line: str) -> str:
    try:
        words = shlex.split(command_line)
    except ValueError:
        return ""
    return words[1] if len(words) > 1 else ""


def _are_unchanged(ancestors: tuple[Ancestor, ...]) -> bool:
    return all(ancestor.state == "unchanged" for ancestor in flat(ancestors))


def _inputs_unchanged(inputs: Mapping[str, str], marker: Path) -> bool:
    return all(find_lineage(place, sha256, marker.parent).state == "unchanged" for place, sha256 in inputs.items())


def _data_unchanged(recorded: Sequence[DataFile], started: str, find: Callable[[], Iterable[Path]]) -> bool:
    """Whether the recorded files are there as they were, and no file is newer than the run."""
    sizes: dict[str, list[Path]] = {}
    try:
        began = datetime.fromisoformat(started).timestamp() + 1  # recorded in whole seconds
        files = list(find())
    except (ValueError, OverflowError, OSError, FlashVaedError):
        return False  # not a time; or a file is missing, which the command reports
    for path in files:
        if path.stat().st_mtime > began:
            return False
        sizes.setdefault(path.name, []).append(path)
    for file in recorded:
        candidates = [path for path in sizes.get(file.name, ()) if path.stat().st_size == file.size_bytes]
        if not any(file.sha256 in (None, sha256_of(path)) for path in candidates):
            return False
    return True
