"""Warn of clips that a decoder was calibrated or trained on: judged on them, it looks better than it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.run_record import DataFile
from flashvaed_cli.artifact.store import sha256_of
from flashvaed_cli.stages.common.ancestry import find_parents, flat

_MAX_NAMED = 5


def warn_of_seen(name: str, header: ArtifactHeader | None, location: str, files: Sequence[Path]) -> str | None:
    """One sentence that names the judged files that are among a decoder's data, by hash, or by name and size where
    nothing else was recorded; None if none is known to be.

    Args:
        name: the decoder's, for the message.
        header: the decoder's.
        location: of its file.
    """
    if header is None:
        return None
    ancestors = flat(find_parents(header, location))
    headers = [header, *(one.header for one in ancestors if one.header is not None)]
    known = {file.name: (command, file) for one in headers for command, file in _data_of(one)}
    hashes = {file.sha256: command for one in headers for command, file in _data_of(one) if file.sha256}
    sizes = {file.size_bytes for one in headers for _, file in _data_of(one)}
    found: dict[str, str] = {}
    for path in files:
        size = path.stat().st_size
        if size not in sizes:
            continue
        if (command := hashes.get(sha256_of(path))) is not None:
            found[path.name] = command
        elif path.name in known and known[path.name][1].sha256 is None and known[path.name][1].size_bytes == size:
            found[path.name] = known[path.name][0]
    if not found:
        return None
    shown = ", ".join(f"{path} ({command})" for path, command in list(found.items())[:_MAX_NAMED])
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return (
        f"{name} has seen {shown}{more}: it looks better on these clips than on others. "
        "Judge it on clips that were not in --data of the commands before."
    )


def _data_of(header: ArtifactHeader) -> list[tuple[str, DataFile]]:
    command = header.command_line.removeprefix("flashvaed ").split(" ")[0] or "an earlier command"
    return [(command, file) for file in header.run.data] if header.run is not None else []
