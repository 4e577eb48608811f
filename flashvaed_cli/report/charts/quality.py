"""What `eval` found: quality against speed, and quality over the frames of a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flashvaed_cli.report.charts.style import LINE_WIDTH, Scheme, colours, dress, legend, new_figure, whole_numbers


@dataclass(frozen=True)
class Point:
    """A decoder in the chart of quality against speed; `source` is set if it was published, not measured here."""

    name: str
    speedup: float
    quality_percent: float
    source: str | None = None


def quality_against_speed(points: Sequence[Point], scheme: Scheme) -> Figure:
    """The share kept of the PSNR to the video, against the speed-up over the eager original.

    Published points are hollow and lettered, because neighbours would hide each other's names.
    """
    figure = new_figure(1, scheme, width=6.4, height=4.2)
    axes = figure.axes[0]
    published = [point for point in points if point.source]
    measured = [point for point in points if not point.source]
    for point, colour in zip(measured, colours(len(measured)), strict=True):
        axes.plot(point.speedup, point.quality_percent, "o", color=colour, markersize=9, label=point.name)
    for letter, point in zip(ascii_uppercase, published, strict=False):
        at, name = (point.speedup, point.quality_percent), f"{letter}: {point.name} (published)"
        axes.plot(*at, "o", markerfacecolor="none", markeredgecolor=scheme.ink, markersize=11, label=name)
        axes.annotate(letter, at, fontsize=7, color=scheme.ink, ha="center", va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    speeds = [point.speedup for point in points]
    slowest, fastest = min(speeds) / 1.3, max(speeds) * 1.3
    axes.set_xlim(slowest, fastest)
    low = min(point.quality_percent for point in points)
    axes.set_ylim(low - max(1.0, 0.15 * (101 - low)), max(101, *(point.quality_percent for point in points)) + 0.5)
    axes.set_xticks([tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if slowest <= tick <= fastest])
    axes.minorticks_off()
    dress(axes, scheme, x_label="speed, the eager original's is 1×", y_label="PSNR to the video kept, %")
    legend(axes, scheme, max_columns=2)
    return figure


def psnr_over_frames(
    curves: Mapping[str, Sequence[float]], scheme: Scheme, *, reference: str, decoders: Sequence[str]
) -> Figure:
    """Decibels of every frame of a clip; identical frames leave a gap.

    Args:
        decoders: all of the report, so that each has one colour in every chart.
    """
    figure = new_figure(1, scheme, width=6.4, height=2.6)
    axes = figure.axes[0]
    colour_of = dict(zip(decoders, colours(len(decoders)), strict=True))
    for name, values in curves.items():
        finite = [value if math.isfinite(value) else np.nan for value in values]
        axes.plot(
            range(len(finite)),
            finite,
            color=colour_of[name],
            linewidth=LINE_WIDTH,
            label=name,
            marker="o",
            markersize=3,
        )
    whole_numbers(axes)
    dress(axes, scheme, x_label="frame", y_label=f"PSNR to the {reference}, dB")
    legend(axes, scheme)
    return figure
