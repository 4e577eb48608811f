"""What commands measured and left in an artifact's header, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.printable import counted

_NUM_WORST = 3


def measured_figures(header: ArtifactHeader) -> dict[str, str]:
    """Figures by name. What is not there, or not of the shape that flashvaed writes, is left out."""
    found: dict[str, str] = {}
    for name, read in _FIGURES.items():
        try:
            if text := read(header.measured):
                found[name] = text
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError):
            continue
    return found


def _clips(measured: Mapping[str, Any]) -> str:
    clips = measured["clips"]
    return f"{clips['num_clips']:d} ({len(clips['skipped'])} skipped)"


def _latency(measured: Mapping[str, Any]) -> str:
    total = sum(sum(stage["latency_ms"].values()) for stage in measured["stages"])
    clips = measured["clips"]
    side = clips["latency_side"]
    return f"{total:.0f} ms for {counted(clips['latency_frames'], 'frame')} of {side} x {side}, {clips['device']}"


def _parameters(measured: Mapping[str, Any]) -> str:
    return f"{measured['parameters_before']:,d} to {measured['parameters_after']:,d}"


def _explained(measured: Mapping[str, Any]) -> str:
    worst = min(measured["selection"], key=lambda one: one["r2"])
    return f"R2 {worst['r2']:.4f} at the least ({worst['group']}, {len(worst['kept'])} of {worst['width']})"


def _worst_layers(measured: Mapping[str, Any]) -> str:
    errors = sorted(measured["layer_errors"], key=lambda one: one["after"], reverse=True)
    return ", ".join(f"{one['address']} {100 * one['after']:.2g} %" for one in errors[:_NUM_WORST])


def _budget(measured: Mapping[str, Any]) -> str:
    return f"{measured['budget']['measured']['speedup']:.2f}x when it was pruned"


def _gflop(measured: Mapping[str, Any]) -> str:
    return f"{measured['gflop_9x256x256_before']:.1f} to {measured['gflop_9x256x256_after']:.1f} for 9 x 256 x 256"


def _difference(measured: Mapping[str, Any]) -> str:
    return f"{measured['max_difference_of_range']:.1e} of the range, the largest"


def _phases(measured: Mapping[str, Any]) -> str:
    return "; ".join(
        f"phase {one['phase']}: {one['num_steps']} steps, {one['seconds'] / 60:.1f} min" for one in measured["phases"]
    )


def _progress(measured: Mapping[str, Any]) -> str:
    return _from_to([entry for phase in measured["phases"] for entry in phase["history"]], "psnr_db", "dB")


def _validation(measured: Mapping[str, Any]) -> str:
    entries = [entry for phase in measured["phases"] for entry in phase["history"]]
    return _from_to(entries, "validation_psnr_db", "dB")


def _from_to(entries: Sequence[Mapping[str, Any]], key: str, unit: str) -> str:
    values = [float(entry[key]) for entry in entries if entry.get(key) is not None]
    return f"{values[0]:.2f} to {values[-1]:.2f} {unit}" if values else ""


_FIGURES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "clips": _clips,
    "latency": _latency,
    "parameters": _parameters,
    "layout": lambda measured: str(measured["layout"]),
    "variance that kept channels explain": _explained,
    "largest errors of layers": _worst_layers,
    "speed-up": _budget,
    "GFLOP": _gflop,
    "difference to the original": _difference,
    "training": _phases,
    "PSNR to the original while training": _progress,
    "PSNR on validation clips": _validation,
}
