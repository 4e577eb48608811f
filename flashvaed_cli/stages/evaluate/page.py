"""Extras on the page of `eval`: lineage, analysis, training log, and a small video per decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.artifact.measured import AnalysisRecord
from flashvaed_cli.atomic import scratch_folder
from flashvaed_cli.media.writer import VideoWriter
from flashvaed_cli.ownership import SOFTWARE
from flashvaed_cli.report.charts.training import figure_name
from flashvaed_cli.report.page.album import ClipAlbum
from flashvaed_cli.report.page.page import LineageEntry, PageExtras
from flashvaed_cli.stages.common.ancestry import find_parents, flat
from flashvaed_cli.stages.distill.files import TrainingFiles

_VIDEO_SIDE_PX = 384
_VIDEO_SECONDS = 6
_VIDEO_CRF = 24
_TRAINING_FIGURES = ("loss", "psnr_db", "validation_psnr_db", "learning_rate")
"""The figures of the training log that the page shows."""


class ClipVideos:
    """A small H.264 video of every decoder's frames, kept in memory at the end. A context manager."""

    def __init__(self, fps: Fraction, height: int, width: int) -> None:
        self._fps = fps
        self._left = max(1, round(_VIDEO_SECONDS * fps))
        scale = min(1.0, _VIDEO_SIDE_PX / max(height, width))
        self._size = (max(2, round(height * scale)), max(2, round(width * scale)))
        self._until_the_end = ExitStack()
        self._writers: dict[str, VideoWriter] = {}
        self._folder = Path()

    def __enter__(self) -> ClipVideos:
        self._folder = self._until_the_end.enter_context(scratch_folder("videos"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for writer in self._writers.values():
                writer.__exit__(kind, error, trace)
        self._until_the_end.__exit__(kind, error, trace)

    def write(self, views: Mapping[str, Float[Tensor, "3 T H W"]]) -> None:
        """Add frames of every decoder, up to six seconds in all."""
        for number, (label, frames) in enumerate(views.items()):
            if label not in self._writers:
                path = self._folder / f"{number}.mp4"
                self._writers[label] = VideoWriter(path, fps=self._fps, crf=_VIDEO_CRF, comment=f"{SOFTWARE} eval")
                self._writers[label].__enter__()
            if part := frames[:, : self._left].shape[1]:
                small = functional.interpolate(
                    frames[:, :part].transpose(0, 1), self._size, mode="bilinear", antialias=True
                )
                self._writers[label].write(small.clamp(-1, 1).transpose(0, 1))
        self._left = max(0, self._left - next(iter(views.values())).shape[1])

    def finish(self) -> dict[str, bytes]:
        """The videos by label."""
        for writer in self._writers.values():
            writer.__exit__(None, None, None)
        videos = {label: writer.path.read_bytes() for label, writer in self._writers.items()}
        self._writers = {}
        return videos


def page_extras(checkpoint: Checkpoint, albums: Sequence[ClipAlbum], command_line: str) -> PageExtras:
    """The decoder's lineage, analysis and training log, where their files still exist unchanged."""
    header = checkpoint.header
    parents = () if header is None else find_parents(header, checkpoint.location)
    ancestors = [one.header for one in flat(parents) if one.header is not None]
    analysis = AnalysisRecord.of(next((one for one in ancestors if one.kind == "analysis"), None))
    curves, phases = _training(Path(checkpoint.location)) if header is not None else ({}, ())
    commands = [one.command_line for one in reversed(ancestors) if one.command_line]
    commands += [header.command_line] if header is not None and header.command_line else []
    return PageExtras(
        albums=tuple(albums),
        latency_ms=None if analysis is None else _latency(analysis),
        r2=None if analysis is None else _r2(analysis),
        training=curves or None,
        phases=phases,
        lineage=_lineage(checkpoint),
        commands=(*dict.fromkeys(commands), command_line),
    )


def _lineage(checkpoint: Checkpoint) -> tuple[LineageEntry, ...]:
    entries = [LineageEntry("judged", checkpoint.location, checkpoint.sha256)]
    if checkpoint.header is not None:
        entries += [LineageEntry(one.role, one.location, one.sha256) for one in checkpoint.header.parents]
        if checkpoint.header.original is not None:
            original = checkpoint.header.original
            entries.append(LineageEntry("original", original.location, original.sha256))
    return tuple({entry.sha256: entry for entry in entries}.values())


def _latency(analysis: AnalysisRecord) -> dict[str, dict[str, float]] | None:
    return {one.stage: one.latency_ms for one in analysis.stages if one.latency_ms} or None


def _r2(analysis: AnalysisRecord) -> dict[str, tuple[float, ...]] | None:
    return {one.stage: one.r2 for one in analysis.groups if one.is_stream} or None


def _training(location: Path) -> tuple[dict[str, list[tuple[float, float]]], tuple[tuple[float, str], ...]]:
    """The curves of the log beside a decoder, with steps counted over all phases, and the first step of each phase."""
    log = TrainingFiles(location).log
    curves: dict[str, list[tuple[float, float]]] = {}
    phases: list[tuple[float, str]] = []
    start, last, index = 0.0, 0.0, None
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]
    except (OSError, ValueError):
        return {}, ()
    for entry in lines:
        if entry["index"] != index:
            start, index = last, entry["index"]
            phases.append((start, f"phase {entry['phase']}"))
        last = start + entry["step"]
        for key in _TRAINING_FIGURES:
            if (value := entry.get(key)) is not None and math.isfinite(value):
                curves.setdefault(figure_name(key), []).append((last, value))
    return curves, tuple(phases)
