"""Charts say what they show: axes, units, names, and both ways out (PNG on paper, SVG in a page's colours)."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from flashvaed_cli.report.charts.analysis import explained_variance, latency_by_stage, spectra
from flashvaed_cli.report.charts.quality import Point, psnr_over_frames, quality_against_speed
from flashvaed_cli.report.charts.style import PAGE, PAPER, save_png, to_svg
from flashvaed_cli.report.charts.training import figure_name, smoothed, training_curves

R2 = {f"up{i}": {"stream": [0.5 + i / 10, 0.999, 1.0], "inside block 0": [0.9, 0.99]} for i in range(4)}
SPECTRA = {f"stage{i}": [1.0, 0.5, -1e-17] for i in range(9)} | {"dead": [0.0, 0.0], "none": []}
LATENCY = {"mid": {"causal3d": 3.0, "attention": 1.0}, "up3": {"dwsep3d": 2.0}, "idle": {}}
LOSSES = {
    "total": [(step, 100 * math.exp(-step / 10)) for step in range(100)],
    "feature": [(step, math.nan if step == 50 else 1.0) for step in range(100)],
    "one": [(0, 1.0)],
    "none": [],
    "all nan": [(0, math.nan)],
}
PHASES = ((0, "phase 1"), (40, "phase 3"))
FRAMES = {"flash": [30.0, math.inf, 31.0], "mild": [40.0, 41.0, 42.0]}
POINTS = (Point("original", 1, 100), Point("flash", 8, 97), Point("theirs", 6, 93, "arXiv 2602.19161"))

FIGURES = {
    "explained": lambda scheme: explained_variance(R2, scheme, title="R2"),
    "spectra": lambda scheme: spectra(SPECTRA, scheme),
    "latency": lambda scheme: latency_by_stage(LATENCY, scheme),
    "training": lambda scheme: training_curves(LOSSES, scheme, phases=PHASES),
    "frames": lambda scheme: psnr_over_frames(FRAMES, scheme, reference="video", decoders=("original", *FRAMES)),
    "quality": lambda scheme: quality_against_speed(POINTS, scheme),
}
EMPTY = (explained_variance, spectra, latency_by_stage, training_curves)


def assert_picture(path: Path) -> None:
    """A PNG with something drawn, and nothing beside it."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 10


def tick_texts(figure: Figure, axis: str, panel: int = 0) -> list[str]:
    figure.canvas.draw()
    return [label.get_text() for label in getattr(figure.axes[panel], f"get_{axis}ticklabels")() if label.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_chart_is_a_picture_and_an_svg(tmp_path: Path, name: str) -> None:
    assert_picture(save_png(FIGURES[name](PAPER), tmp_path / "chart.png"))
    svg = to_svg(FIGURES[name](PAGE))
    assert svg.startswith("<svg")
    assert "currentColor" in svg and "var(--line)" in svg
    assert PAGE.ink not in svg and PAGE.faint not in svg  # every stand-in got the page's colour


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_says_what_it_shows(name: str) -> None:
    for axes in FIGURES[name](PAPER).axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_title() or axes.get_yticklabels()


def test_ids_of_two_charts_on_one_page_differ() -> None:
    one, two = (set(re.findall(r'\bid="([^"]+)"', to_svg(FIGURES[name](PAGE)))) for name in ("frames", "latency"))
    assert one
    assert not one & two


@pytest.mark.parametrize("draw", EMPTY)
def test_nothing_to_draw_is_an_empty_picture(tmp_path: Path, draw: Callable[..., Figure]) -> None:
    assert_picture(save_png(draw({}, PAPER, title="nothing"), tmp_path / "empty.png"))


def test_r2_near_one_is_told_apart_on_a_log_scale() -> None:
    figure = explained_variance({"up0": {"stream": [0.9, 0.999, 1.0]}}, PAPER)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    drawn = axes.lines[0].get_xydata()
    np.testing.assert_allclose(np.asarray(drawn), [(100 / 3, 10), (200 / 3, 0.1), (100, 0.001)])
    assert "10" in tick_texts(figure, "y")  # plain numbers, not powers


def test_spectra_name_the_components_that_suffice() -> None:
    (axes,) = spectra({"up0": [98.0, 1.5, 0.5], "up1": [1.0, 1.0]}, PAPER).axes
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["up0: 2 of 3 components for 99 %", "up1: 2 of 2 components for 99 %"]


def test_steps_and_frames_are_whole_numbers() -> None:
    short = training_curves({"loss": [(1, 3.0), (2, 2.0)]}, PAPER)
    assert all("." not in text for text in tick_texts(short, "x"))
    assert all("." not in text for text in tick_texts(FIGURES["frames"](PAPER), "x"))


def test_a_decoder_has_one_colour_in_every_chart() -> None:
    decoders = ("original", *FRAMES)
    both = psnr_over_frames({"original": [30.0], **FRAMES}, PAPER, reference="video", decoders=decoders)
    some = psnr_over_frames(FRAMES, PAPER, reference="original", decoders=decoders)
    (all_axes,), (some_axes,) = both.axes, some.axes
    assert [line.get_color() for line in all_axes.lines][1:] == [line.get_color() for line in some_axes.lines]


def test_phases_are_set_apart() -> None:
    axes = training_curves({"loss": [(1, 3.0), (60, 2.0)]}, PAPER, phases=PHASES).axes[0]
    assert [text.get_text() for text in axes.texts] == ["phase 1", "phase 3"]
    alone = training_curves({"loss": [(1, 3.0), (60, 2.0)]}, PAPER, phases=PHASES[:1]).axes[0]
    assert not alone.texts


def test_shares_of_the_time_are_written_at_the_bars() -> None:
    (axes,) = FIGURES["latency"](PAPER).axes
    assert [text.get_text() for text in axes.texts] == ["4 ms · 67 %", "2 ms · 33 %", "0 ms · 0 %"]


def test_every_point_is_named_and_published_ones_are_lettered() -> None:
    (axes,) = FIGURES["quality"](PAPER).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["original", "flash", "A: theirs (published)"]
    assert [text.get_text() for text in axes.texts] == ["A"]


def test_figures_have_names_for_people() -> None:
    assert figure_name("psnr_db") == "PSNR to the original, dB"
    assert figure_name("something_new") == "something new"


def test_smoothing_keeps_a_line_and_spans_gaps() -> None:
    line = np.linspace(0, 1, 201)
    smooth = smoothed(line)
    np.testing.assert_allclose(smooth[10:-10], line[10:-10], atol=1e-12)
    line[100] = np.nan
    assert np.isfinite(smoothed(line)).all()


def test_no_global_plotting_state() -> None:
    """In a process of its own: other packages of this one may have loaded pyplot."""
    names = ", ".join(f"flashvaed_cli.report.charts.{name}" for name in ("analysis", "quality", "training"))
    program = f"import sys, {names}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
