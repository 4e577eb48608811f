"""Files beside the output of training: checkpoints, log, strips, and the lock that keeps other runs away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashvaed_cli.distill.checkpoint import checkpoint_state
from flashvaed_cli.errors import DistillationError
from flashvaed_cli.locks import exclusive_lock


@dataclass(frozen=True)
class TrainingFiles:
    """Their paths, all named after the output."""

    output: Path

    def checkpoint(self, index: int) -> Path:
        """The checkpoint of the `index`th phase (from 1) that is run."""
        return self.output.with_suffix(f".phase{index}.ckpt")

    @property
    def log(self) -> Path:
        """The training log, JSON lines."""
        return self.output.with_suffix(".log.jsonl")

    @property
    def samples(self) -> Path:
        """The folder of strips."""
        return self.output.with_suffix(".samples")

    @property
    def curves(self) -> Path:
        """The plot of the losses."""
        return self.output.with_suffix(".losses.png")

    def replaced(self) -> tuple[Path, ...]:
        """The files beside its output that a run may replace."""
        return self.log, self.curves, self.samples

    def checkpoints(self, num_phases: int) -> list[Path]:
        """The checkpoints of the first `num_phases` phases that exist."""
        places = map(self.checkpoint, range(1, num_phases + 1))
        return [path for path in places if path.exists()]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs from training the same output while the block runs.

        Raises:
            DistillationError: another one does.
        """
        with exclusive_lock(
            self.output.with_name(f".{self.output.stem}.training.lock"),
            lambda holder: DistillationError(
                f"another run is training {self.output} ({holder}): wait until it has ended, or give this one another "
                "--output"
            ),
        ):
            yield


def describe_checkpoints(paths: list[Path]) -> str:
    """`flash.phase1.ckpt (phase 1, 40 of 100 steps)`, and so on."""
    return ", ".join(f"{path} ({_describe(path)})" for path in paths)


def _describe(path: Path) -> str:
    try:
        return str(checkpoint_state(path))
    except DistillationError:
        return "unreadable"
