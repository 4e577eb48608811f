from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.media.padding import pad_clip

sizes = st.integers(1, 20)
factors = st.sampled_from([1, 2, 4, 8, 16])


@given(num_frames=sizes, height=sizes, width=sizes, temporal_factor=factors, spatial_factor=factors)
def test_the_clip_stays_where_it_was_and_its_edges_are_repeated(
    num_frames: int, height: int, width: int, temporal_factor: int, spatial_factor: int
) -> None:
    clip = torch.randn(3, num_frames, height, width)
    padded = pad_clip(clip, temporal_factor=temporal_factor, spatial_factor=spatial_factor)
    frames2, height2, width2 = padded.shape[1:]
    assert (frames2 - 1) % temporal_factor == height2 % spatial_factor == width2 % spatial_factor == 0
    assert frames2 - num_frames < temporal_factor
    assert height2 - height < spatial_factor
    assert width2 - width < spatial_factor
    assert torch.equal(padded[:, :num_frames, :height, :width], clip)
    assert torch.equal(padded[:, -1], padded[:, num_frames - 1])
    assert torch.equal(padded[..., -1, :], padded[..., height - 1, :])
    assert torch.equal(padded[..., -1], padded[..., width - 1])


def test_nothing_to_pad_copies_nothing() -> None:
    clip = torch.zeros(3, 5, 16, 8)
    assert pad_clip(clip, temporal_factor=4, spatial_factor=8) is clip


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="cannot pad"):
        pad_clip(torch.zeros(3, 0, 8, 8), temporal_factor=4, spatial_factor=8)
