"""Outputs to follow while training runs: a log, TensorBoard, and strips of a sample clip."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.distill.checkpoint import HistoryEntry
from flashvaed_cli.distill.loop import AfterStep
from flashvaed_cli.errors import DistillationError
from flashvaed_cli.progress import Progress
from flashvaed_cli.report.pictures import save_strip

_NOT_CURVES = ("step", "seconds")


class TrainingLog:
    """`NAME.log.jsonl`: one line per entry of the history, only ever appended to.

    A resumed run repeats steps that were logged before it was killed; they are not logged twice. The first line names
    the run: another run's log is replaced, but only with the first entry, so that a refused run leaves it alone.
    """

    def __init__(self, path: Path, run_key: str, *, resumes: bool) -> None:
        self._path = path
        self._last = (0, 0)
        header = json.dumps({"run_key": run_key})
        lines = _whole_lines(path) if resumes else []
        if lines[:1] != [header]:
            lines = [header]
        for line in lines[1:]:
            entry = json.loads(line)
            self._last = max(self._last, (entry["index"], entry["step"]))
        self._begun: list[str] | None = lines

    def append(self, index: int, phase: int, entry: HistoryEntry) -> None:
        """Add an entry of the `index`th phase (from 1) that was run."""
        place = (index, int(entry["step"]))
        if place <= self._last:
            return
        if self._begun is not None:
            with atomic_path(self._path) as sibling:
                sibling.write_text("".join(f"{line}\n" for line in self._begun), encoding="utf-8")
            self._begun = None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": index, "phase": phase, **entry}) + "\n")
        self._last = place


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a log, without one that a kill has cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return text[: text.rfind("\n") + 1].splitlines()


class TensorBoardLog:
    """The same entries for TensorBoard. Steps count on from phase to phase."""

    def __init__(self, folder: Path) -> None:
        """Raises DistillationError: the package is not installed."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise DistillationError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard, or leave the flag out"
            ) from error
        self._open: Callable[..., Any] = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def append(self, done_before: int, phase: int, entry: HistoryEntry) -> None:
        """Add an entry of a phase before which `done_before` steps were done."""
        step = done_before + int(entry["step"])
        if self._writer is None:  # a resumed run goes through some steps again: purge those
            self._writer = self._open(log_dir=str(self._folder), purge_step=step)
        for name, value in entry.items():
            if name not in _NOT_CURVES:
                self._writer.add_scalar(f"phase {phase}/{name}", value, step)
        self._writer.flush()


class SampleStrips:
    """A PNG of original, student and their difference on one clip, every `every_s` seconds, in `NAME.samples/`."""

    def __init__(
        self,
        folder: Path,
        latents: Float[Tensor, "1 C T Hz Wz"],
        student: Decoder,
        teacher: Decoder,
        *,
        every_s: float,
    ) -> None:
        self._folder, self._every_s = folder, every_s
        self._latents, self._student, self._teacher = latents, student, teacher
        self._drawn_at = time.monotonic()

    def draw_if_due(self, phase: int, step: int) -> None:
        """Draw a strip if `every_s` seconds have passed since the last."""
        if time.monotonic() - self._drawn_at < self._every_s:
            return
        latents = self._latents.to(next(self._student.parameters()).device)
        with torch.no_grad():
            rows = [(n, decode(d, latents)[0]) for n, d in (("original", self._teacher), ("student", self._student))]
        save_strip(self._folder / f"phase{phase}-step{step:06d}.png", rows)
        self._drawn_at = time.monotonic()


class TrainingWatch:
    """Feeds log, TensorBoard and strips. None of them may end training: if the disk refuses one, it warns once."""

    def __init__(
        self, progress: Progress, log: TrainingLog, board: TensorBoardLog | None, strips: SampleStrips | None
    ) -> None:
        self._progress, self._log, self._board, self._strips = progress, log, board, strips
        self._refused: set[str] = set()

    def for_phase(self, index: int, phase: int, done_before: int) -> AfterStep:
        """The function to call after each step of the `index`th phase (from 1), after `done_before` earlier steps."""

        def after_step(step: int | None, entry: HistoryEntry | None) -> None:
            if entry is not None:
                self._attempt("log", lambda: self._log.append(index, phase, entry))
                if (board := self._board) is not None and step is not None:  # it has those of the past
                    self._attempt("TensorBoard", lambda: board.append(done_before, phase, entry))
            if (strips := self._strips) is not None and step is not None:
                self._attempt("sample strips", lambda: strips.draw_if_due(phase, step))

        return after_step

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        if name in self._refused:
            return
        try:
            action()
        except OSError as error:
            self._refused.add(name)
            self._progress.warn(f"{name}: not written from here on: {error}")
