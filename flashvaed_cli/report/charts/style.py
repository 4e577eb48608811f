"""How every chart looks, and its two output formats: a PNG beside an artifact, an `<svg>` for the page.

No pyplot: nothing global, no display, safe in threads. A figure is drawn in the colours of a `Scheme`; the page's are
placeholders that `to_svg` replaces with CSS, so that one SVG reads well on a light and on a dark page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.ownership import SOFTWARE

LINE_WIDTH = 1.6
_DPI = 150
_ID = re.compile(r'(\bid="|url\(#|href="#)')
_PALETTE = ("#2a78d6", "#eb6834", "#1baf7a", "#c58a00", "#7a63d2", "#e0679a", "#3f9142", "#e34948")


@dataclass(frozen=True)
class Scheme:
    """The colours of everything in a chart but its data."""

    ink: str
    faint: str
    paper: str


PAPER = Scheme(ink="#27272a", faint="#d4d4d8", paper="white")
PAGE = Scheme(ink="#010203", faint="#040506", paper="none")
_CSS = {PAGE.ink: "currentColor", PAGE.faint: "var(--line)"}


def columns_for(num_panels: int, max_columns: int = 3) -> int:
    """How many panels go in a row."""
    return 2 if num_panels in (2, 4) else min(max_columns, max(1, num_panels))


def new_figure(
    num_panels: int, scheme: Scheme, *, width: float, height: float, title: str = "", max_columns: int = 3
) -> Figure:
    """A figure of `num_panels` axes (`figure.axes`) in rows. With none it is still a picture.

    Args:
        width, height: in inches; the width is that of the figure, the height that of one row.
    """
    num_columns = columns_for(num_panels, max_columns)
    num_rows = max(1, math.ceil(num_panels / num_columns))
    figure = Figure(figsize=(width, height * num_rows + (0.4 if title else 0)), layout="constrained")
    figure.set_facecolor(scheme.paper)
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold", color=scheme.ink, x=0.01, horizontalalignment="left")
    for index in range(num_panels):
        figure.add_subplot(num_rows, num_columns, index + 1)
    return figure


def dress(axes: Axes, scheme: Scheme, *, x_label: str, y_label: str = "", title: str = "") -> None:
    """Labels with their units, a quiet grid, and two of the four spines."""
    axes.set_facecolor("none")
    axes.set_title(title, fontsize=9, color=scheme.ink, loc="left")
    axes.set_xlabel(x_label, fontsize=8.5, color=scheme.ink)
    axes.set_ylabel(y_label, fontsize=8.5, color=scheme.ink)
    axes.tick_params(which="both", labelsize=8, color=scheme.faint, labelcolor=scheme.ink)
    axes.grid(visible=True, color=scheme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(scheme.faint)


def whole_numbers(axes: Axes, *, max_ticks: int = 6) -> None:
    """Ticks of the horizontal axis at whole numbers, because steps and frames are counted."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max_ticks, integer=True))


def logarithmic(axes: Axes, values: np.ndarray, *, max_ticks: int = 7) -> None:
    """A logarithmic vertical axis over positive `values`, with plain numbers at its ticks.

    Within two decades 1, 2 and 5 are labelled, beyond that only powers of ten.
    """
    axes.set_yscale("log")
    decades = math.log10(values.max() / values.min()) if values.size else 0.0
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=max_ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(axes: Axes, scheme: Scheme, *, inside: bool = False, max_columns: int = 4) -> None:
    """The names of what is drawn, above the axes or in their upper right corner; nothing if nothing has a name."""
    _, names = axes.get_legend_handles_labels()
    if not names:
        return
    if inside:
        axes.legend(fontsize=7, frameon=False, labelcolor=scheme.ink, loc="upper right")
        return
    axes.legend(
        fontsize=8, frameon=False, labelcolor=scheme.ink, ncols=min(max_columns, len(names)), loc="lower left",
        bbox_to_anchor=(0, 1.0), borderaxespad=0.2,
    )  # fmt: skip


def colours(count: int) -> list[str]:
    """Distinct for colour-blind readers, on white and on black; beyond eight, an ordered colour map takes over."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps["viridis"](0.1 + 0.8 * i / (count - 1))) for i in range(count)]


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure atomically."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as sibling, _any_script():
        figure.savefig(sibling, format="png", dpi=_DPI, metadata={"Software": SOFTWARE})
    return path


@contextmanager
def _any_script() -> Iterator[None]:
    """Characters that matplotlib's font lacks become boxes in a PNG; on a page the browser's fonts show them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(figure: Figure) -> str:
    """The `<svg>` element alone, text as text, with unique ids (a page has several)."""
    FigureCanvasSVG(figure)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "flashvaed", "font.family": "sans-serif"}
    buffer = io.StringIO()
    with mpl.rc_context(settings), _any_script():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = _ID.sub(rf"\g<1>{own}-", text)
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    head, _, body = text.partition(">")
    return f'{head} role="img">{body}'
