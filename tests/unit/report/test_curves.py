from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvaed_cli.report.curves import _smoothed, plot_latency, plot_losses, plot_r2_curves, plot_spectra


def assert_picture(path: Path) -> None:
    """A PNG with something drawn, and nothing beside it."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 10


def test_r2_curves(tmp_path: Path) -> None:
    curves = {f"up{i}": {"stream": [(0.25, 0.5 + i / 10), (1.0, 1.0)], "empty": []} for i in range(4)}
    assert_picture(plot_r2_curves(tmp_path / "r2.png", curves))


def test_spectra_with_rounding_noise_and_dead_stages(tmp_path: Path) -> None:
    spectra = {f"stage{i}": [1.0, 0.5, -1e-17] for i in range(9)} | {"dead": [0.0, 0.0], "none": []}
    assert_picture(plot_spectra(tmp_path / "spectra.png", spectra))


def test_latency(tmp_path: Path) -> None:
    latency_ms = {"mid": {"causal3d": 3.0, "attention": 1.0}, "up3": {"dwsep3d": 2.0}, "idle": {}}
    assert_picture(plot_latency(tmp_path / "latency.png", latency_ms))


def test_losses_of_different_scale_and_with_gaps(tmp_path: Path) -> None:
    steps = range(100)
    losses = {
        "total": [(step, 100 * math.exp(-step / 10)) for step in steps],
        "feature": [(step, math.nan if step == 50 else 1.0) for step in steps],
        "one": [(0, 1.0)],
        "none": [],
        "all nan": [(0, math.nan)],
    }
    assert_picture(plot_losses(tmp_path / "losses.png", losses))


@pytest.mark.parametrize("plot", [plot_r2_curves, plot_spectra, plot_latency, plot_losses])
def test_nothing_to_plot_is_an_empty_picture(tmp_path: Path, plot: object) -> None:
    assert callable(plot)
    plot(tmp_path / "empty.png", {}, title="nothing")
    assert_picture(tmp_path / "empty.png")


def test_smoothing_keeps_a_line_and_spans_gaps() -> None:
    line = np.linspace(0, 1, 201)
    smooth = _smoothed(line)
    np.testing.assert_allclose(smooth[10:-10], line[10:-10], atol=1e-12)
    line[100] = np.nan
    assert np.isfinite(_smoothed(line)).all()


def test_no_global_plotting_state() -> None:
    """In a process of its own: other packages of this one may have loaded pyplot."""
    program = "import sys, flashvaed_cli.report.curves; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
