"""The measurements in an artifact's header, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.measured import (
    AnalysisRecord,
    ConversionRecord,
    DistillRecord,
    LayerFigures,
    PhaseRecord,
    PruneRecord,
)
from flashvaed_cli.printable import counted

_NUM_WORST = 3


def measured_figures(header: ArtifactHeader) -> dict[str, str]:
    """Figures by name. Those that are absent, or not in the form that flashvaed writes, are left out."""
    found: dict[str, str] = {}
    if header.kind == "analysis":
        if analysis := AnalysisRecord.of(header):
            found |= _of_analysis(analysis)
    elif pruned := PruneRecord.of(header):
        found |= _of_pruning(pruned)
    elif converted := ConversionRecord.of(header):
        found |= _of_conversion(converted)
    elif trained := DistillRecord.of(header):
        found |= _of_training(trained)
    return {name: text for name, text in found.items() if text}


def _of_analysis(record: AnalysisRecord) -> dict[str, str]:
    clips = record.clips
    total = sum(sum(stage.latency_ms.values()) for stage in record.stages)
    size = f"{counted(clips.latency_frames or 0, 'frame')} of {clips.latency_side} x {clips.latency_side}"
    return {
        "clips": f"{clips.num_clips} ({len(clips.skipped)} skipped)",
        "latency": f"{total:.0f} ms for {size}, {clips.device}" if record.stages else "",
    }


def _of_pruning(record: PruneRecord) -> dict[str, str]:
    explained = ""
    if record.selection:
        worst = min(record.selection, key=lambda one: one.r2)
        explained = f"R2 {worst.r2:.4f} at the least ({worst.group}, {len(worst.kept)} of {worst.width})"
    return {
        "parameters": f"{record.parameters_before:,d} to {record.parameters_after:,d}",
        "layout": record.layout or "",
        "variance that kept channels explain": explained,
        "largest errors of layers": _worst_layers(record.layer_errors),
        "speed-up": "" if record.budget is None else f"{record.budget.measured.speedup:.2f}x when it was pruned",
    }


def _of_conversion(record: ConversionRecord) -> dict[str, str]:
    before, after, difference = (
        record.gflop_9x256x256_before,
        record.gflop_9x256x256_after,
        record.max_difference_of_range,
    )
    return {
        "largest errors of layers": _worst_layers(record.layer_errors),
        "GFLOP": f"{before:.1f} to {after:.1f} for 9 x 256 x 256",
        "difference to the original": "" if difference is None else f"{difference:.1e} of the range, the largest",
    }


def _of_training(record: DistillRecord) -> dict[str, str]:
    phases = (f"phase {one.phase}: {one.num_steps} steps, {one.seconds / 60:.1f} min" for one in record.phases)
    return {
        "training": "; ".join(phases),
        "PSNR to the original while training": _first_to_last(record.phases, "psnr_db"),
        "PSNR on validation clips": _first_to_last(record.phases, "validation_psnr_db"),
    }


def _worst_layers(errors: Iterable[LayerFigures]) -> str:
    worst = sorted(errors, key=lambda one: one.after, reverse=True)[:_NUM_WORST]
    return ", ".join(f"{one.address} {100 * one.after:.2g} %" for one in worst)


def _first_to_last(phases: Sequence[PhaseRecord], figure: str) -> str:
    values = [value for phase in phases for entry in phase.history if (value := entry.get(figure)) is not None]
    return f"{values[0]:.2f} to {values[-1]:.2f} dB" if values else ""
