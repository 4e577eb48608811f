"""Charts of the page, as SVG with the text kept as text and the colours left to the page (light and dark)."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Colours that the page replaces: they stand for what the reader's scheme makes of them.
_INK, _FAINT = "#010203", "#040506"
_SCHEME = {_INK: "currentColor", _FAINT: "var(--line)"}
_ID = re.compile(r'(\bid="|url\(#|href="#)')
PALETTE = ("#2a78d6", "#eb6834", "#1baf7a", "#c58a00", "#7a63d2", "#e0679a", "#3f9142", "#e34948")
"""Of decoders in the order of the report; readable on white and on black."""


@dataclass(frozen=True)
class Point:
    """A decoder in the chart of quality against speed; with a `source` where it was published, not measured here."""

    name: str
    speedup: float
    quality_percent: float
    source: str | None = None


def quality_against_speed(points: Sequence[Point]) -> str:
    """How much of the PSNR to the video is kept, against how many times faster than the eager original."""
    figure, axes = _figure(6.4, 3.6)
    published = [point for point in points if point.source]
    measured = [point for point in points if not point.source]
    for point, colour in zip(measured, _cycled(len(measured)), strict=True):
        axes.plot(point.speedup, point.quality_percent, "o", color=colour, markersize=8)
        _name(axes, point)
    for point in published:
        axes.plot(point.speedup, point.quality_percent, "o", color=_FAINT, markerfacecolor="none", markeredgecolor=_INK)
        _name(axes, point)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    speeds = [point.speedup for point in points]
    axes.set_xlim(min(speeds) / 1.3, max(speeds) * 2.2)
    low = min(point.quality_percent for point in points)
    axes.set_ylim(low - max(1.0, 0.15 * (101 - low)), max(101, *(point.quality_percent for point in points)) + 0.5)
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if min(speeds) / 1.3 <= tick <= max(speeds) * 2.2]
    axes.set_xticks(ticks, minor=False)
    axes.minorticks_off()
    _dress(axes, "times faster than the eager original", "PSNR to the video kept, %")
    return _svg(figure)


def psnr_over_frames(curves: Mapping[str, Sequence[float]], *, reference: str) -> str:
    """Decibels of every frame of a clip; frames that are the same leave a gap."""
    figure, axes = _figure(6.4, 2.6)
    for (name, values), colour in zip(curves.items(), _cycled(len(curves)), strict=True):
        finite = [value if math.isfinite(value) else np.nan for value in values]
        axes.plot(range(len(finite)), finite, color=colour, linewidth=1.8, label=name, marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, "frame", f"PSNR to the {reference}, dB")
    _legend(axes)
    return _svg(figure)


def latency_by_stage(latency_ms: Mapping[str, Mapping[str, float]]) -> str:
    """Milliseconds of the stages in forward order, stacked by operator."""
    stages = list(latency_ms)
    operators = list(dict.fromkeys(name for times in latency_ms.values() for name in times))
    figure, axes = _figure(6.4, 1.2 + 0.32 * len(stages))
    left = np.zeros(len(stages))
    for operator, colour in zip(operators, _cycled(len(operators)), strict=True):
        widths = np.array([latency_ms[stage].get(operator, 0.0) for stage in stages])
        axes.barh(stages, widths, left=left, color=colour, height=0.7, label=operator)
        left += widths
    axes.invert_yaxis()
    _dress(axes, "ms, by operator", "")
    axes.grid(visible=False, axis="y")
    _legend(axes)
    return _svg(figure)


def explained_variance(curves: Mapping[str, Sequence[float]]) -> str:
    """1 - R2 of the kept channels by how many are kept, on a log scale: where all is near 1, the rest tells."""
    figure, axes = _figure(6.4, 3.2)
    for (name, r2), colour in zip(curves.items(), _cycled(len(curves)), strict=True):
        kept = (np.arange(len(r2)) + 1) / len(r2)
        left_over = np.clip(1 - np.asarray(r2, dtype=float), 1e-6, 1)
        axes.plot(100 * kept, 100 * left_over, color=colour, linewidth=1.8, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _dress(axes, "channels kept, %", "variance not explained, %")
    _legend(axes)
    return _svg(figure)


def training_curves(curves: Mapping[str, Sequence[tuple[float, float]]], phases: Sequence[tuple[float, str]]) -> str:
    """One panel per figure over the steps of all phases; a line and a name where a phase begins."""
    names = list(curves)
    num_rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(6.4, 0.5 + 1.9 * num_rows), layout="constrained")
    FigureCanvasSVG(figure)
    for index, (name, colour) in enumerate(zip(names, _cycled(len(names)), strict=True)):
        axes = figure.add_subplot(num_rows, min(2, len(names)), index + 1)
        steps, values = np.asarray(curves[name], dtype=float).reshape(-1, 2).T
        axes.plot(steps, values, color=colour, linewidth=1.4)
        positive = values[np.isfinite(values) & (values > 0)]
        if positive.size == values.size and positive.size and positive.max() > 20 * positive.min():
            axes.set_yscale("log")
        for start, label in phases if len(phases) > 1 else ():
            axes.axvline(start, color=_INK, linewidth=0.7, linestyle=(0, (3, 3)))
            axes.annotate(label, (start, 1), xycoords=("data", "axes fraction"), fontsize=7, color=_INK, va="bottom")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _dress(axes, "step", name)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _name(axes: Axes, point: Point) -> None:
    label = f"{point.name} (published)" if point.source else point.name
    axes.annotate(
        label, (point.speedup, point.quality_percent), xytext=(8, -3), textcoords="offset points",
        fontsize=8, color=_INK,
    )  # fmt: skip


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK)
    axes.grid(visible=True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _legend(axes: Axes) -> None:
    _, names = axes.get_legend_handles_labels()
    if names:
        axes.legend(
            fontsize=8, frameon=False, labelcolor=_INK, ncols=min(4, len(names)), loc="lower left",
            bbox_to_anchor=(0, 1.0), borderaxespad=0.2,
        )  # fmt: skip


def _cycled(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _svg(figure: Figure) -> str:
    """The `<svg>` element alone, with ids of its own (several stand on one page) and the page's colours."""
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "flashvaed", "font.family": "sans-serif"}
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = _ID.sub(rf"\g<1>{own}-", text)
    for colour, scheme in _SCHEME.items():
        text = text.replace(colour, scheme)
    head, _, body = text.partition(">")
    return f'{head} role="img">{body}'
