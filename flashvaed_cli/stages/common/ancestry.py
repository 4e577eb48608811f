"""The files that an artifact was made from, where they still exist.

An artifact's records may come from a stranger: a recorded path is opened only to compute its hash, and read only if
that is the recorded one. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashvaed_cli.artifact.checkpoint import BUILTIN_SCHEME, locate
from flashvaed_cli.artifact.foreign.weights import checkpoint_files
from flashvaed_cli.artifact.header import ArtifactHeader, Lineage
from flashvaed_cli.artifact.hub import SCHEME
from flashvaed_cli.artifact.store import read_header, sha256_of_files
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.ownership import has_own_header
from flashvaed_cli.paths import user_path
from flashvaed_cli.zoo.builtin import BUILTINS

State = Literal["unchanged", "changed", "absent"]
_MAX_DEPTH = 16


@dataclass(frozen=True)
class Ancestor:
    """A recorded file.

    Attributes:
        state: whether it is still in its place, with the recorded hash.
        header: that of an unchanged artifact; None for originals of other programs.
        parents: the files that it was made from in turn.
    """

    lineage: Lineage
    state: State
    header: ArtifactHeader | None = None
    parents: tuple[Ancestor, ...] = ()


def find_parents(header: ArtifactHeader, location: str) -> tuple[Ancestor, ...]:
    """The parents of an artifact; recorded paths are relative to the working directory, or to the artifact's folder.

    The original is among them if no parent leads to it.

    Args:
        location: of the artifact.
    """
    return _parents(header, Path(location).parent, _MAX_DEPTH)


def find_lineage(location: str, sha256: str, folder: Path) -> Ancestor:
    """One file by its hash and its recorded path, relative to the working directory or to `folder`."""
    return _find(Lineage(role="input", location=location, sha256=sha256), folder, 0)


def flat(ancestors: tuple[Ancestor, ...]) -> Iterator[Ancestor]:
    """All of them, each hash once, nearest first."""
    waiting, seen = list(ancestors), set()
    while waiting:
        ancestor = waiting.pop(0)
        if ancestor.lineage.sha256 not in seen:
            seen.add(ancestor.lineage.sha256)
            yield ancestor
        waiting += ancestor.parents


def _parents(header: ArtifactHeader, folder: Path, depth: int) -> tuple[Ancestor, ...]:
    found = tuple(_find(one, folder, depth) for one in header.parents)
    original = header.original
    if original is None or any(one.lineage.sha256 == original.sha256 for one in flat(found)):
        return found
    return (*found, _find(original, folder, depth))


def _find(lineage: Lineage, folder: Path, depth: int) -> Ancestor:
    path = _place(lineage.location, folder)
    if path is None:
        return Ancestor(lineage, "absent")
    try:
        if sha256_of_files(checkpoint_files(path, lineage.weights)) != lineage.sha256:
            return Ancestor(lineage, "changed")
        if not depth or not has_own_header(path):
            return Ancestor(lineage, "unchanged")
        header = read_header(path)
    except (FlashVaedError, OSError):
        return Ancestor(lineage, "changed")
    return Ancestor(lineage, "unchanged", header, _parents(header, path.parent, depth - 1))


def _place(location: str, folder: Path) -> Path | None:
    if location.startswith((BUILTIN_SCHEME, SCHEME)):
        try:
            return locate(location, BUILTINS, may_download=False)
        except FlashVaedError:
            return None
    try:
        return next((path for path in (user_path(location), folder / location) if path.exists()), None)
    except (FlashVaedError, OSError, ValueError):
        return None
