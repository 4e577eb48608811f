"""VMAF as streams give it, against an ffmpeg that reads the same frames from files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.media.pixels import to_pixels
from flashvaed_cli.metrics import vmaf
from flashvaed_cli.metrics.vmaf import VmafStream, find_ffmpeg


@pytest.fixture
def ffmpeg() -> str:
    try:
        return find_ffmpeg()
    except MetricUnavailableError as error:
        pytest.skip(str(error))


def test_it_is_what_ffmpeg_says_of_files(ffmpeg: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 12, 9, 11, generator=generator)
    reference = 2 * torch.nn.functional.interpolate(coarse, (72, 88), mode="bilinear") - 1
    output = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clamp(-1, 1)
    for name, frames in (("output", output), ("reference", reference)):
        (tmp_path / name).write_bytes(b"".join(frame.tobytes() for frame in to_pixels(frames, 0)))
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "88x72", "-r", "25"]
    graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
    inputs = [*form, "-i", "output", *form, "-i", "reference"]
    subprocess.run([ffmpeg, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], cwd=tmp_path, check=True)
    expected = json.loads((tmp_path / "log.json").read_text())["pooled_metrics"]["vmaf"]["mean"]
    with VmafStream(ffmpeg, 72, 88) as stream:
        for one, other in zip(output.split(5, dim=1), reference.split(5, dim=1), strict=True):
            stream.update(to_pixels(one, 0), to_pixels(other, 0))
        assert stream.result() == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 100


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_one_flat_frame_and_odd_sides_have_a_value(ffmpeg: str, size: tuple[int, int]) -> None:
    frames = torch.full((3, 1, *size), 0.25)
    with VmafStream(ffmpeg, *size) as stream:
        stream.update(to_pixels(frames, 0), to_pixels(frames, 0))
        assert stream.result() > 90


def test_a_program_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho 'no such filter' >&2\nexit 1\n")
    broken.chmod(0o755)
    with VmafStream(str(broken), 32, 32) as stream, pytest.raises(MetricUnavailableError, match="ffmpeg failed"):
        stream.update(
            to_pixels(torch.zeros(3, 200, 32, 32), 0), to_pixels(torch.zeros(3, 200, 32, 32), 0)
        )  # more than a pipe holds
    with VmafStream(str(broken), 32, 32) as stream, pytest.raises(MetricUnavailableError, match="no such filter"):
        stream.result()


def test_without_such_an_ffmpeg_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmaf, "_imageios", lambda: None)
    monkeypatch.setenv("PATH", "")
    find_ffmpeg.cache_clear()
    try:
        with pytest.raises(MetricUnavailableError, match=r"^VMAF is left out: .*pip install 'flashvaed\[vmaf\]'"):
            find_ffmpeg()
    finally:
        find_ffmpeg.cache_clear()
