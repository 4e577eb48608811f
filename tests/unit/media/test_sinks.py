"""Frames go into files chunk by chunk, and come out again; what is not complete is not there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.pixels import to_pixels
from flashvaed_cli.media.sinks.arrays import ArrayWriter
from flashvaed_cli.media.sinks.pictures import PictureFile, PictureFolder
from flashvaed_cli.media.sinks.raw import RawWriter
from flashvaed_cli.ownership import is_own_file

FRAMES = torch.linspace(-1.0, 1.0, 3 * 7 * 4 * 5).reshape(3, 7, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_an_array_file_holds_the_frames(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path, frames = tmp_path / f"frames{suffix}", FRAMES.to(dtype)
    with ArrayWriter(path, num_frames=7) as writer:
        for chunk in frames.split([1, 4, 2], dim=1):
            writer.write(chunk)
    read = torch.from_numpy(np.load(path)) if suffix == ".npy" else torch.load(path, weights_only=True)
    assert read.dtype == (torch.float32 if (suffix, dtype) == (".npy", torch.bfloat16) else dtype)
    assert torch.equal(read, frames.to(read.dtype))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize(
    ("chunks", "error", "told"),
    [
        ([FRAMES[:, :5]], MediaError, "5 of 7 frames"),
        ([FRAMES[:, :2], FRAMES[..., :2]], ValueError, "continue"),
        ([FRAMES, FRAMES], ValueError, "continue"),
    ],
)
def test_an_array_file_of_other_frames_than_announced_is_not_there(
    tmp_path: Path, suffix: str, chunks: list[torch.Tensor], error: type[Exception], told: str
) -> None:
    def write() -> None:
        with ArrayWriter(tmp_path / f"frames{suffix}", num_frames=7) as writer:
            for chunk in chunks:
                writer.write(chunk)

    with pytest.raises(error, match=told):
        write()
    assert not list(tmp_path.iterdir())


def test_pictures_hold_the_pixels_and_our_mark(tmp_path: Path) -> None:
    with PictureFolder(tmp_path) as sink:
        sink.write(FRAMES[:, :3])
        sink.write(FRAMES[:, 3:])
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(7)]
    read = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (read == to_pixels(FRAMES)).all()
    assert all(map(is_own_file, files))


def test_one_picture_takes_one_frame(tmp_path: Path) -> None:
    with PictureFile(tmp_path / "one.png") as sink:
        sink.write(FRAMES[:, :1])
        with pytest.raises(MediaError, match="one picture"):
            sink.write(FRAMES[:, 1:2])
    assert (np.asarray(Image.open(tmp_path / "one.png")) == to_pixels(FRAMES)[0]).all()


def test_raw_frames_are_rgb_bytes_one_after_the_other() -> None:
    stream = io.BytesIO()
    with RawWriter(stream) as sink:
        sink.write(FRAMES[:, :3])
        sink.write(FRAMES[:, 3:])
    assert stream.getvalue() == to_pixels(FRAMES).tobytes()


def test_pixels_are_rounded_and_clipped() -> None:
    frames = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.5]).reshape(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert to_pixels(frames)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="number 8 on hold NaN"):
        to_pixels(frames.clone().fill_(torch.nan), first=8)
