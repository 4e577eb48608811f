"""How a training run went: every figure over the steps of all its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from flashvaed_cli.report.charts.style import (
    Scheme,
    colours,
    columns_for,
    dress,
    logarithmic,
    new_figure,
    whole_numbers,
)

Points = Sequence[tuple[float, float]]

_NAMES = {
    "loss": "loss, weighted sum",
    "l1": "L1",
    "mse": "mean squared error",
    "lpips": "LPIPS",
    "feature": "feature loss",
    "ssim": "1 - SSIM",
    "l_ce": "1 - R² given the kept channels",
    "sharpness": "sharpness loss",
    "energy": "energy loss",
    "temporal": "temporal loss",
    "psnr_db": "PSNR to the original, dB",
    "validation_psnr_db": "validation PSNR to the original, dB",
    "validation_sharpness": "validation sharpness, original's = 1",
    "learning_rate": "learning rate",
}


def figure_name(key: str) -> str:
    """The readable name of a figure in a training history, with its unit."""
    return _NAMES.get(key, key.replace("_", " "))


def training_curves(
    curves: Mapping[str, Points],
    scheme: Scheme,
    *,
    phases: Sequence[tuple[float, str]] = (),
    x_label: str = "step",
    title: str = "",
    max_columns: int = 3,
) -> Figure:
    """One panel per figure: raw values faintly, smoothed over a twentieth of the run, and a line where a phase begins.

    Args:
        curves: name, with its unit, to points (step or what `x_label` says, value). Non-finite values leave
            a gap. A figure that falls by a factor of more than 20 gets a logarithmic axis.
        phases: first step and name of each; not drawn if there is only one.
    """
    width = max(6.4, 3.7 * columns_for(len(curves), max_columns))
    figure = new_figure(len(curves), scheme, width=width, height=2.6, title=title, max_columns=max_columns)
    for axes, (name, points), colour in zip(figure.axes, curves.items(), colours(len(curves)), strict=True):
        x, y = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
        y = np.where(np.isfinite(y), y, np.nan)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35, marker="." if len(x) == 1 else None)
        axes.plot(x, smoothed(y), color=colour, linewidth=1.8)
        seen = y[~np.isnan(y)]
        if seen.size and seen.min() > 0 and seen.max() > 20 * seen.min():
            logarithmic(axes, seen)
        whole_numbers(axes, max_ticks=5)
        last = f": {smoothed(y)[-1]:.4g} at the end" if seen.size else ": nothing yet"
        dress(axes, scheme, x_label=x_label, title=name + last)
        for start, label in phases if len(phases) > 1 else ():
            axes.axvline(start, color=scheme.ink, linewidth=0.7, linestyle=(0, (3, 3)))
            axes.annotate(
                label, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                fontsize=7, color=scheme.ink, va="top",
            )  # fmt: skip
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the points, ignoring gaps."""
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
