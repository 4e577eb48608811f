"""Record a command's own run, for the artifact that it writes."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

import flashvaed_cli
from flashvaed_cli.artifact.run_record import MAX_LISTED_FILES, DataFile, RunRecord
from flashvaed_cli.artifact.store import sha256_of

_MAX_HASHED_BYTES = 1_000_000_000
_GIT_TIMEOUT_S = 5


@dataclass(frozen=True)
class RunWatch:
    """Made when a command begins."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)

    def record(self, device: torch.device, data: Sequence[Path] = (), *, speedup: float | None = None) -> RunRecord:
        """The run so far: call it when the artifact is about to be written.

        Args:
            data: the clips and latents that were read; up to 64 files of 1 GB in all are hashed.
            speedup: measured on the result; it varies, so it is not part of the hash that names the artifact.
        """
        return RunRecord(
            commit=_commit(),
            torch=torch.__version__,
            device=describe_device(device),
            num_threads=torch.get_num_threads(),
            started=self.started.isoformat(timespec="seconds"),
            duration_s=round(time.perf_counter() - self.clock, 3),
            data=described_files(data),
            num_data_files=len(data),
            speedup=speedup,
        )


def describe_device(device: torch.device) -> str:
    """A device with the name of its model, if this machine reports it."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()})" if device.type == "cpu" else device.type


def described_files(data: Sequence[Path]) -> tuple[DataFile, ...]:
    """Names, sizes and, unless there are many or large ones, hashes of files."""
    sizes = {path: path.stat().st_size for path in data if path.is_file()}
    is_small = len(sizes) <= MAX_LISTED_FILES and sum(sizes.values()) <= _MAX_HASHED_BYTES
    return tuple(
        DataFile(name=path.name, size_bytes=size, sha256=sha256_of(path) if is_small else None)
        for path, size in list(sizes.items())[:MAX_LISTED_FILES]
    )


def _commit() -> str | None:
    """The commit of the tree that this package lies in; None for an installed one."""
    folder = Path(flashvaed_cli.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ("git", "-C", str(folder), *words), capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
    )
    return done.stdout.strip()
