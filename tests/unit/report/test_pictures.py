from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from flashvaed_cli.report.pictures import save_strip, select_frames, side_by_side


def clip(num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, num_frames, height, width, generator=generator) * 2 - 1


@given(count=st.integers(1, 3), num_frames=st.integers(1, 3), height=st.integers(1, 50), width=st.integers(1, 50))
def test_side_by_side_keeps_every_pixel_and_has_even_sides(
    count: int, num_frames: int, height: int, width: int
) -> None:
    clips = [(f"clip {i}", clip(num_frames, height, width) / (i + 1)) for i in range(count)]
    composed = side_by_side(clips)
    assert composed.shape[:2] == (3, num_frames)
    assert composed.shape[2] % 2 == composed.shape[3] % 2 == 0
    band_px = 16
    for index, (_, frames) in enumerate(clips):
        left = index * (width + 4)
        assert torch.equal(composed[:, :, band_px : band_px + height, left : left + width], frames)


def test_side_by_side_of_chunks_is_side_by_side_of_the_whole() -> None:
    frames = clip(5, 20, 30)
    whole = side_by_side([("a", frames), ("b", -frames)])
    parts = [side_by_side([("a", part), ("b", -part)]) for part in frames.split(2, dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_labels_are_drawn_and_differ() -> None:
    frames = torch.zeros(3, 1, 120, 160)
    one, other = (side_by_side([(label, frames)]) for label in ("original", "flash"))
    assert not torch.equal(one, other)
    assert one[:, :, :16].max() > 0.5
    side_by_side([("a very long label that cannot fit in so narrow a clip", torch.zeros(3, 1, 8, 8))])


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        side_by_side([("a", clip(1, 8, 8)), ("b", clip(2, 8, 8))])
    with pytest.raises(ValueError, match="no clips"):
        side_by_side([])
    with pytest.raises(ValueError, match="a frame or more"):
        side_by_side([("a", torch.zeros(3, 0, 8, 8))])


@given(num_frames=st.integers(1, 200), num_columns=st.integers(1, 8))
def test_selected_frames_are_distinct_and_span_the_clip(num_frames: int, num_columns: int) -> None:
    chosen = select_frames(num_frames, num_columns)
    assert len(set(chosen)) == len(chosen) == min(num_frames, num_columns)
    assert all(0 <= index < num_frames for index in chosen)
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, num_frames - 1)


def test_strip_zooms_on_the_greatest_difference(tmp_path: Path) -> None:
    """The only difference is one red square in frame 2: the close-up's difference row must show it."""
    original = torch.zeros(3, 3, 64, 96)
    flash = original.clone()
    flash[0, 2, 40:50, 70:80] = 0.25
    path = save_strip(tmp_path / "new" / "strip.png", [("video", original), ("original", original), ("flash", flash)])
    assert [file.name for file in path.parent.iterdir()] == ["strip.png"]
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    last_row = pixels[-70:]
    # 0.25 on a range of 2, amplified 4 times, is half of 255; once as it is and once enlarged 2 x 2
    red = np.abs(last_row - np.array([128, 0, 0])).max(axis=-1) <= 1
    assert red.sum() == pytest.approx(100 + 400, rel=0.2)  # the frame around the close-up may cross the square


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 13), (16, 8), (400, 90)])
def test_strip_of_any_size(tmp_path: Path, height: int, width: int) -> None:
    frames = clip(2, height, width)
    path = save_strip(tmp_path / "strip.png", [("a", frames), ("b", -frames)])
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_strip_of_chosen_frames(tmp_path: Path) -> None:
    frames = clip(2, 16, 16)
    save_strip(tmp_path / "strip.png", [("a", frames), ("b", frames)], frame_numbers=[0, 80])
    with pytest.raises(ValueError, match="3 frame numbers for 2 frames"):
        save_strip(tmp_path / "strip.png", [("a", frames), ("b", frames)], frame_numbers=[0, 1, 2])
    with pytest.raises(ValueError, match="two clips or more"):
        save_strip(tmp_path / "strip.png", [("a", frames)])
