"""Report a distillation: its tables, its curves, and its record in the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashvaed_cli.artifact.measured import PhaseRecord
from flashvaed_cli.distill.loop import TrainResult
from flashvaed_cli.recipe.distill import PhaseRecipe
from flashvaed_cli.report.charts.style import PAPER, save_png
from flashvaed_cli.report.charts.training import figure_name, training_curves
from flashvaed_cli.report.tables import Column, TableData

PhaseResult = tuple[PhaseRecipe, TrainResult]


def phase_record(phase: PhaseRecipe, result: TrainResult) -> PhaseRecord:
    """The record of one phase for the artifact and `--json`."""
    return PhaseRecord(
        phase=phase.phase,
        num_steps=result.num_steps,
        seconds=result.seconds,
        data_seconds=result.data_seconds,
        clips_per_s=result.clips_per_s,
        resumed_from=result.resumed_from,
        absent_terms=result.absent_terms,
        history=tuple(result.history),
    )


def draw_curves(output: Path, results: Sequence[PhaseResult]) -> Path:
    """Every loss term and the PSNR to the original over all phases, beside the output."""
    curves: dict[str, list[tuple[float, float]]] = {}
    phases: list[tuple[float, str]] = []
    done = 0
    for phase, result in results:
        phases.append((done, f"phase {phase.phase}"))
        for entry in result.history:
            for name, value in entry.items():
                if name not in ("step", "seconds", "learning_rate"):
                    curves.setdefault(figure_name(name), []).append((done + entry["step"], value))
        done += result.num_steps
    figure = training_curves(curves, PAPER, phases=phases, title="Training")
    return save_png(figure, output.with_suffix(".losses.png"))


def same_clips_table(before: float, after: float, num_clips: int) -> TableData:
    """The gain from training on a fixed set of clips, since batches differ from step to step."""
    columns = (Column("PSNR to the original, dB", align="left"), Column("before", ".2f"), Column("after", ".2f"))
    return TableData("", columns, ((f"the same {num_clips} training clips", before, after),))


def phase_table(results: Sequence[PhaseResult]) -> TableData:
    """One row per phase."""
    columns = (
        Column("phase", "d"),
        Column("steps", "d"),
        Column("loss, first", ".4f"),
        Column("last", ".4f"),
        Column("PSNR dB, first batch", ".2f"),
        Column("last", ".2f"),
        Column("clips/s", ".2f"),
        Column("minutes", ".1f"),
    )
    rows = []
    for phase, result in results:
        trained = [entry for entry in result.history if "loss" in entry]
        first, last = (trained[i] if trained else {} for i in (0, -1))
        figures = [entry.get(name) for name in ("loss", "psnr_db") for entry in (first, last)]
        rows.append((phase.phase, result.num_steps, *figures, result.clips_per_s, result.seconds / 60))
    return TableData("Distillation", columns, tuple(rows))
