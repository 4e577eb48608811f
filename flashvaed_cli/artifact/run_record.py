"""How an artifact was made: when, on what and from which data. Stored in its header, but not part of its hash."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, FiniteFloat

MAX_LISTED_FILES = 64


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFile(_Frozen):
    """A file of the data set.

    Attributes:
        name: without its folder.
        sha256: None in large data sets, for which only names and sizes are recorded.
    """

    name: str
    size_bytes: int
    sha256: str | None = None


class RunRecord(_Frozen):
    """One run of a command.

    Attributes:
        commit: of the source tree that ran, if it is a git one; ends in `+` if there are uncommitted changes.
        torch: its version.
        device: what was computed on, such as `cuda:0 (NVIDIA H100)`.
        started: UTC, ISO 8601.
        duration_s: seconds until the artifact was written; if training was resumed, those of the last run.
        speedup: times faster than the eager original, measured at the end of the command.
        data: the first `MAX_LISTED_FILES` of the `num_data_files`.
    """

    commit: str | None = None
    torch: str
    device: str
    num_threads: int
    started: str
    duration_s: FiniteFloat
    data: tuple[DataFile, ...] = ()
    num_data_files: int = 0
    speedup: FiniteFloat | None = None
