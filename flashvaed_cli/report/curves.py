"""PNG plots of an analysis and of a training. No pyplot: nothing global, no display, safe in threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.ownership import SOFTWARE

Points = Sequence[tuple[float, float]]

# distinct for colour-blind readers in this order; beyond eight, an ordered map takes over
_PALETTE = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#4a3aa7", "#e87ba4", "#008300", "#e34948")
_INK = "#27272a"
_FAINT = "#a1a1aa"
_GRID = "#e4e4e7"
_DPI = 150


def plot_r2_curves(path: Path, curves: Mapping[str, Mapping[str, Points]], *, title: str = "") -> Path:
    """How much of a channel group's variance its greedily chosen channels explain.

    Args:
        path: PNG to write.
        curves: stage to channel group to points (fraction kept, R²); one panel per stage.
        title: above all panels.
    """
    figure, panels = _panels(len(curves), title or "Variance explained by the kept channels")
    lowest = min((r2 for groups in curves.values() for points in groups.values() for _, r2 in points), default=0.0)
    for axes, (stage, groups) in zip(panels, curves.items(), strict=True):
        for (group, points), colour in zip(groups.items(), _colours(len(groups)), strict=True):
            x, y = _columns(points)
            axes.plot(x, y, color=colour, linewidth=1.6, label=group, marker="o" if len(x) < 12 else None, markersize=3)
        _dress(axes, stage, "channels kept", "R²")
        axes.set_xlim(0, 1)
        axes.set_ylim(max(0.0, min(0.9, math.floor(lowest * 10) / 10)), 1.005)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        if groups:
            axes.legend(fontsize=7, frameon=False, loc="lower right")
    return _save(figure, path)


def plot_spectra(path: Path, spectra: Mapping[str, Sequence[float]], *, title: str = "") -> Path:
    """Cumulative explained variance over the principal components of each stage.

    Args:
        path: PNG to write.
        spectra: stage to eigenvalues of its covariance, in any order; not negative beyond rounding.
        title: above the plot.
    """
    figure, (axes,) = _panels(1, title or "Explained variance", width=6.4, height=4.2)
    for (stage, eigenvalues), colour in zip(spectra.items(), _colours(len(spectra)), strict=True):
        values = np.sort(np.clip(np.asarray(eigenvalues, dtype=np.float64), 0, None))[::-1]
        if values.size == 0 or values.sum() == 0:
            axes.plot([], [], color=colour, label=f"{stage} (no variance)")
            continue
        share = np.concatenate([[0.0], np.cumsum(values) / values.sum()])
        rank = int(np.searchsorted(share, 0.99 - 1e-12))
        axes.plot(
            np.linspace(0, 1, share.size), share, color=colour, linewidth=1.6,
            label=f"{stage}: {rank} of {values.size} for 99 %",
        )  # fmt: skip
    axes.axhline(0.99, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    _dress(axes, "", "components, share of the width", "variance explained")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    if spectra:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _save(figure, path)


def plot_latency(path: Path, latency_ms: Mapping[str, Mapping[str, float]], *, title: str = "") -> Path:
    """Where the time goes: one bar per stage, stacked by operator.

    Args:
        path: PNG to write.
        latency_ms: stage to operator to milliseconds, in forward order.
        title: above the plot.
    """
    stages = list(latency_ms)
    operators = list(dict.fromkeys(operator for times in latency_ms.values() for operator in times))
    totals = np.array([sum(latency_ms[stage].values()) for stage in stages])
    figure, (axes,) = _panels(1, title or "Latency by stage and operator", width=6.8, height=1.3 + 0.42 * len(stages))
    left = np.zeros(len(stages))
    for operator, colour in zip(operators, _colours(len(operators)), strict=True):
        widths = np.array([latency_ms[stage].get(operator, 0.0) for stage in stages])
        # a white edge keeps neighbours apart where colours are printed in grey
        axes.barh(stages, widths, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.7, label=operator)
        left += widths
    whole = float(totals.sum())
    for row, total in enumerate(totals):
        share = f" · {100 * total / whole:.0f} %" if whole else ""
        axes.annotate(
            f"{total:.3g} ms{share}", (total, row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=_INK,
        )  # fmt: skip
    axes.invert_yaxis()
    _dress(axes, "", "ms", "")
    axes.grid(visible=False, axis="y")
    if whole:
        axes.set_xlim(0, float(totals.max()) * 1.22)
    if operators:
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    return _save(figure, path)


def plot_losses(path: Path, losses: Mapping[str, Points], *, title: str = "", x_label: str = "step") -> Path:
    """Training curves: every term faint as it was, and smoothed over a twentieth of the run.

    Args:
        path: PNG to write.
        losses: name to points (step or what `x_label` says, value). Values that are not finite leave a gap.
        title: above all panels; one panel per name, since the terms differ in scale.
    """
    figure, panels = _panels(len(losses), title or "Training")
    for axes, (name, points), colour in zip(panels, losses.items(), _colours(len(losses)), strict=True):
        x, y = _columns(points)
        y = np.where(np.isfinite(y), y, np.nan)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35, marker="." if len(x) == 1 else None)
        axes.plot(x, _smoothed(y), color=colour, linewidth=1.8)
        seen = y[~np.isnan(y)]
        if seen.size and seen.min() > 0 and seen.max() > 20 * seen.min():
            axes.set_yscale("log")
        last = f": {_smoothed(y)[-1]:.4g} at the end" if seen.size else ": nothing yet"
        _dress(axes, name + last, x_label, "")
    return _save(figure, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the points; gaps are left out of it."""
    half = len(values) // 40
    if half == 0:
        return values
    known = ~np.isnan(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    num = counts[high] - counts[low]
    return np.where(num > 0, (totals[high] - totals[low]) / np.maximum(num, 1), np.nan)


def _panels(num_panels: int, title: str, *, width: float = 0.0, height: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with panels of one size, at most three in a row. At least one, so that nothing is still a picture."""
    num_columns = 2 if num_panels == 4 else min(3, max(1, num_panels))
    num_rows = max(1, math.ceil(num_panels / num_columns))
    size = (width or max(5.0, 3.7 * num_columns), height or 2.9 * num_rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK, x=0.01, horizontalalignment="left")
    panels = [figure.add_subplot(num_rows, num_columns, i + 1) for i in range(num_panels)]
    return figure, panels


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=9, color=_INK, loc="left")
    axes.set_xlabel(x_label, fontsize=8, color=_INK)
    axes.set_ylabel(y_label, fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)


def _colours(count: int) -> list[str]:
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps["viridis"](0.92 * i / (count - 1))) for i in range(count)]


def _columns(points: Points) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as sibling:
        figure.savefig(sibling, format="png", dpi=_DPI, metadata={"Software": SOFTWARE})
    return path
