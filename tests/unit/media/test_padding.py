from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.media.padding import Padding, crop_clip, pad_clip

sizes = st.integers(1, 20)
factors = st.sampled_from([1, 2, 4, 8, 16])


@given(num_frames=sizes, height=sizes, width=sizes, temporal_factor=factors, spatial_factor=factors)
def test_pad_then_crop_is_exact(
    num_frames: int, height: int, width: int, temporal_factor: int, spatial_factor: int
) -> None:
    clip = torch.randn(3, num_frames, height, width)
    padded, padding = pad_clip(clip, temporal_factor=temporal_factor, spatial_factor=spatial_factor)
    frames2, height2, width2 = padded.shape[1:]
    assert (frames2 - 1) % temporal_factor == height2 % spatial_factor == width2 % spatial_factor == 0
    assert frames2 - num_frames < temporal_factor
    assert height2 - height < spatial_factor
    assert width2 - width < spatial_factor
    assert torch.equal(crop_clip(padded, padding), clip)
    assert padding == Padding(num_frames, height, width)
    assert torch.equal(padded[:, -1], padded[:, num_frames - 1])
    assert torch.equal(padded[..., -1, :], padded[..., height - 1, :])
    assert torch.equal(padded[..., -1], padded[..., width - 1])


@given(num_frames=sizes, chunk=sizes)
def test_chunks_crop_like_the_whole(num_frames: int, chunk: int) -> None:
    clip = torch.randn(2, 3, num_frames, 5, 3)
    padded, padding = pad_clip(clip, temporal_factor=8, spatial_factor=4)
    parts = [
        crop_clip(padded[:, :, first : first + chunk], padding, first_frame=first)
        for first in range(0, padded.shape[2], chunk)
    ]
    assert torch.equal(torch.cat(parts, dim=2), clip)


def test_nothing_to_pad_copies_nothing() -> None:
    clip = torch.zeros(3, 5, 16, 8)
    assert pad_clip(clip, temporal_factor=4, spatial_factor=8)[0] is clip


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="cannot pad"):
        pad_clip(torch.zeros(3, 0, 8, 8), temporal_factor=4, spatial_factor=8)
    with pytest.raises(ValueError, match="cannot be cut"):
        crop_clip(torch.zeros(3, 1, 8, 8), Padding(1, 9, 8))
