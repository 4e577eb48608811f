"""What `eval` found: quality against speed, and quality over the frames of a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flashvaed_cli.report.charts.style import LINE_WIDTH, Scheme, colours, dress, legend, new_figure, whole_numbers


@dataclass(frozen=True)
class Point:
    """A decoder in the chart of quality against speed; with a `source` where it was published, not measured here."""

    name: str
    speedup: float
    quality_percent: float
    source: str | None = None


def quality_against_speed(points: Sequence[Point], scheme: Scheme) -> Figure:
    """How much of the PSNR to the video is kept, against how many times faster than the eager original."""
    figure = new_figure(1, scheme, width=6.4, height=3.6)
    axes = figure.axes[0]
    published = [point for point in points if point.source]
    measured = [point for point in points if not point.source]
    for point, colour in zip(measured, colours(len(measured)), strict=True):
        axes.plot(point.speedup, point.quality_percent, "o", color=colour, markersize=8)
    for point in published:
        axes.plot(point.speedup, point.quality_percent, "o", markerfacecolor="none", markeredgecolor=scheme.ink)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    speeds = [point.speedup for point in points]
    slowest, fastest = min(speeds) / 1.3, max(speeds) * 2.2
    axes.set_xlim(slowest, fastest)
    low = min(point.quality_percent for point in points)
    axes.set_ylim(low - max(1.0, 0.15 * (101 - low)), max(101, *(point.quality_percent for point in points)) + 0.5)
    axes.set_xticks([tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if slowest <= tick <= fastest])
    axes.minorticks_off()
    dress(axes, scheme, x_label="times faster than the eager original", y_label="PSNR to the video kept, %")
    _write_names(axes, points, scheme)
    return figure


def psnr_over_frames(curves: Mapping[str, Sequence[float]], scheme: Scheme, *, reference: str) -> Figure:
    """Decibels of every frame of a clip; frames that are the same leave a gap."""
    figure = new_figure(1, scheme, width=6.4, height=2.6)
    axes = figure.axes[0]
    for (name, values), colour in zip(curves.items(), colours(len(curves)), strict=True):
        finite = [value if math.isfinite(value) else np.nan for value in values]
        axes.plot(range(len(finite)), finite, color=colour, linewidth=LINE_WIDTH, label=name, marker="o", markersize=3)
    whole_numbers(axes)
    dress(axes, scheme, x_label="frame", y_label=f"PSNR to the {reference}, dB")
    legend(axes, scheme)
    return figure


def _write_names(axes: Axes, points: Sequence[Point], scheme: Scheme) -> None:
    """Each beside its point; those that would run into each other step down, from the best quality to the worst."""
    low, high = axes.get_ylim()
    line = (high - low) * 0.055
    written: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: -one.quality_percent):
        height = point.quality_percent
        near = [y for speed, y in written if abs(math.log(speed / point.speedup)) < math.log(4)]
        while any(abs(height - y) < line for y in near):
            height -= line * 0.5
        written.append((point.speedup, height))
        label = f"{point.name} (published)" if point.source else point.name
        axes.annotate(
            label, (point.speedup, point.quality_percent), xytext=(point.speedup * 1.12, height), textcoords="data",
            fontsize=8, color=scheme.ink, va="center",
        )  # fmt: skip
