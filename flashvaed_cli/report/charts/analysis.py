"""What `analyze` found: how strongly channels depend on one another, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flashvaed_cli.report.charts.style import (
    LINE_WIDTH,
    Scheme,
    colours,
    dress,
    legend,
    logarithmic,
    new_figure,
)

_LEAST_SHOWN = 1e-5
"""A share of the variance: anything below is rounding of covariances, and would stretch the axis without end."""


def explained_variance(
    panels: Mapping[str, Mapping[str, Sequence[float]]], scheme: Scheme, *, title: str = ""
) -> Figure:
    """What the kept channels leave unexplained, by how many are kept: near R2 = 1 the remainder tells more.

    Args:
        panels: panel to curve to R2 after 1, 2, ... channels.
    """
    width = 6.4 if len(panels) <= 1 else 11
    figure = new_figure(len(panels), scheme, width=width, height=3.2, title=title)
    for axes, (panel, curves) in zip(figure.axes, panels.items(), strict=True):
        left_over = [np.clip(1 - np.asarray(r2, dtype=float), _LEAST_SHOWN, 1) for r2 in curves.values()]
        for name, values, colour in zip(curves, left_over, colours(len(curves)), strict=True):
            kept = 100 * (np.arange(len(values)) + 1) / max(1, len(values))
            marker = "o" if len(values) == 1 else None
            axes.plot(kept, 100 * values, color=colour, linewidth=LINE_WIDTH, label=name, marker=marker, markersize=3)
        logarithmic(axes, np.concatenate([100 * values for values in left_over]) if left_over else np.ones(0))
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter(PercentFormatter(100))
        dress(axes, scheme, x_label="channels kept", y_label="variance not explained, %", title=panel)
        legend(axes, scheme, inside=len(panels) > 1)
    return figure


def spectra(eigenvalues: Mapping[str, Sequence[float]], scheme: Scheme, *, title: str = "") -> Figure:
    """The variance beyond the first principal components of each stage, with the number of them that reaches 99 %.

    Args:
        eigenvalues: stage to its covariance's eigenvalues, in any order; not negative beyond rounding.
    """
    figure = new_figure(1, scheme, width=6.8, height=4.2, title=title)
    axes, seen = figure.axes[0], []
    for (stage, found), colour in zip(eigenvalues.items(), colours(len(eigenvalues)), strict=True):
        values = np.sort(np.clip(np.asarray(found, dtype=np.float64), 0, None))[::-1]
        if values.size == 0 or values.sum() == 0:
            axes.plot([], [], color=colour, label=f"{stage} (no variance)")
            continue
        beyond = np.clip(1 - np.cumsum(values) / values.sum(), _LEAST_SHOWN, 1)
        rank = 1 + int(np.argmax(beyond <= 0.01 + 1e-12))
        share = 100 * (np.arange(values.size) + 1) / values.size
        label = f"{stage}: {rank} of {values.size} components for 99 %"
        axes.plot(share, 100 * beyond, color=colour, linewidth=LINE_WIDTH, label=label)
        seen.append(100 * beyond)
    axes.axhline(1, color=scheme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    logarithmic(axes, np.concatenate(seen) if seen else np.ones(0))
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PercentFormatter(100))
    dress(axes, scheme, x_label="principal components, share of the width", y_label="variance beyond them, %")
    legend(axes, scheme, inside=True)
    return figure


def latency_by_stage(latency_ms: Mapping[str, Mapping[str, float]], scheme: Scheme, *, title: str = "") -> Figure:
    """One bar per stage in forward order, stacked by operator, with its share of the whole.

    Args:
        latency_ms: stage to operator to milliseconds.
    """
    stages = list(latency_ms)
    operators = list(dict.fromkeys(name for times in latency_ms.values() for name in times))
    totals = np.array([sum(latency_ms[stage].values()) for stage in stages])
    figure = new_figure(1, scheme, width=6.6, height=1.3 + 0.36 * len(stages), title=title)
    axes, left = figure.axes[0], np.zeros(len(stages))
    for operator, colour in zip(operators, colours(len(operators)), strict=True):
        widths = np.array([latency_ms[stage].get(operator, 0.0) for stage in stages])
        axes.barh(stages, widths, left=left, color=colour, height=0.7, label=operator)
        left += widths
    whole = float(totals.sum())
    for row, total in enumerate(totals):
        share = f" · {100 * total / whole:.0f} %" if whole else ""
        axes.annotate(
            f"{total:.3g} ms{share}", (total, row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=scheme.ink,
        )  # fmt: skip
    axes.invert_yaxis()
    dress(axes, scheme, x_label="milliseconds, by operator")
    axes.grid(visible=False, axis="y")
    if whole:
        axes.set_xlim(0, float(totals.max()) * 1.25)
    legend(axes, scheme)
    return figure
