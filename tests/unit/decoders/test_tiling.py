"""Tiles change no frame: windows cover the frame, and the halo is as large as it must be, and no larger."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.tiling import halo_at, scale_at, split_addresses, tile_layout, windows_along
from flashvaed_cli.decoders.variants.exact import exact_spec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.toy import DECODER_SPECS, toy_decoder

SPEC = DECODER_SPECS["original"]


@given(length=st.integers(1, 300), core=st.integers(1, 320), halo=st.integers(0, 15))
@settings(max_examples=150)
def test_windows_partition_the_axis_and_have_one_size(length: int, core: int, halo: int) -> None:
    windows = windows_along(length, core, halo)
    kept = [i for window in windows for i in range(window.keep_start, window.keep_stop)]
    assert kept == list(range(length))
    assert len({window.stop - window.start for window in windows}) == 1
    assert windows[0].stop <= min(length, core + 2 * halo)
    for window in windows:
        assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= length
        assert window.start == 0 or window.keep_start - window.start >= halo
        assert window.stop == length or window.stop - window.keep_stop >= halo


def test_tiles_begin_after_the_last_attention() -> None:
    splits = split_addresses(SPEC)
    assert splits == ("up0.0", "up0.3", "up1.0", "up1.3", "up2.0", "up2.3", "up3.0", "head.0")
    assert [scale_at(SPEC, split) for split in splits] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_halo_by_hand() -> None:
    # up3: three blocks of two 3x3 layers, and the head; up2.3: half a unit more for the 3x3 on doubled frames
    assert [halo_at(SPEC, split) for split in ("head.0", "up3.0", "up2.3")] == [1, 7, 4]
    assert halo_at(exact_spec(SPEC), "up0.0") == halo_at(SPEC, "up0.0") == 13


def _rest(decoder: Decoder, split: str, x: Tensor) -> Tensor:
    addresses = [address for address, _ in decoder.blocks()]
    with torch.no_grad():
        for _, block in list(decoder.blocks())[addresses.index(split) :]:
            x = block(x, None, None)
    return x


@pytest.mark.parametrize("name", ["original", "flash"])
@pytest.mark.parametrize("split", ["up1.3", "up2.0", "up2.3", "up3.0", "head.0"])
def test_the_halo_is_just_wide_enough(name: str, split: str) -> None:
    """Cutting off the left side at the halo changes nothing beyond it; one column further it does."""
    spec = DECODER_SPECS[name]
    decoder = toy_decoder(spec).double()
    halo, enlargement = halo_at(spec, split), spec.spatial_factor // scale_at(spec, split)
    channels = decoder.spec_of(split).in_width
    x = torch.randn(1, channels, 1, 3, halo + 3, dtype=torch.float64)
    whole = _rest(decoder, split, x)[..., (halo + 1) * enlargement :]
    enough = _rest(decoder, split, x[..., 1:])[..., halo * enlargement :]
    short = _rest(decoder, split, x[..., 2:])[..., (halo - 1) * enlargement :]
    torch.testing.assert_close(enough, whole, rtol=0, atol=1e-13)
    assert (short - whole).abs().max() > 1e-12  # small, but more than rounding


def test_layout_of_a_portrait_that_no_tile_divides() -> None:
    layout = tile_layout(SPEC, 13, 7, tile=5, split="up3.0")
    assert layout.num_tiles == 6 and layout.halo == 7 and layout.enlargement == 1
    assert layout.rows[-1].keep_stop == 104 and layout.columns[-1].keep_stop == 56


def test_a_tile_as_large_as_the_frame_is_the_frame() -> None:
    layout = tile_layout(SPEC, 4, 6, tile=50, split="up1.0")
    assert layout.num_tiles == 1 and layout.window == (8, 12)


def test_mistakes_are_named() -> None:
    with pytest.raises(SpecError, match="at least 1 latent wide, not 0"):
        tile_layout(SPEC, 4, 6, tile=0, split="up1.0")
    with pytest.raises(SpecError, match=r"no block 'up9.0'.*there are up0.0, up0.3"):
        tile_layout(SPEC, 4, 6, tile=2, split="up9.0")
    with pytest.raises(SpecError, match=r"cannot begin at mid.0: mid.1 \(attention\)"):
        halo_at(SPEC, "mid.0")


def test_the_released_decoder_needs_small_halos_when_split_late() -> None:
    spec = wan_decoder_spec(96)
    assert halo_at(spec, "up2.3") / scale_at(spec, "up2.3") == 1.0  # latents
