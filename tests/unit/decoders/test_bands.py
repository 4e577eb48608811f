"""Blocks in bands of rows give the frames and the state of whole clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.bands import bands
from flashvaed_cli.decoders.modules.blocks import ResBlock
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last
from flashvaed_cli.decoders.predict import bands as module
from flashvaed_cli.decoders.predict.bands import BandShape
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.families.registry import FAMILIES, get_family
from flashvaed_cli.surgery.respec import converted_spec
from tests.toy import DECODER_SPECS, toy_decoder

pytestmark = pytest.mark.unchecked  # many runs of what other modules check

LATENTS = torch.randn(2, 4, 3, 7, 5, generator=torch.Generator().manual_seed(0))
RESBLOCK_FAMILIES = [name for name, family in FAMILIES.items() if family.paper_operators]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Bands of three rows; returns the sizes that were taken."""
    for name, value in (("BYTES_PER_FRAME", 1), ("BYTES_PER_CLIP", 1), ("FEWEST_BYTES", 1), ("FEWEST_ROWS", 3)):
        monkeypatch.setattr(module, name, value)
    found: list[tuple[int, int]] = []
    plain = BandShape.size

    def noted(self: BandShape, *sizes: int) -> tuple[int, int] | None:
        size = plain(self, *sizes)
        found.extend([] if size is None else [size])
        return size

    monkeypatch.setattr(BandShape, "size", noted)
    return found


def flash_of(name: str) -> DecoderSpec:
    """A small decoder of a family with the paper's operators."""
    family = get_family(name)
    blocks = dict(family.decoder_spec(32, family.latent_width).blocks()).values()
    width = 32 if any(block.sees_whole_frames for block in blocks) else 4
    return converted_spec(family.decoder_spec(width, family.latent_width), family.paper_operators)


@torch.no_grad()
def difference(decoder: Decoder, latents: Tensor, **settings: Any) -> float:
    """From the frames of a decoder that never runs in bands, as a share of their range; in double precision."""
    decoder, latents = decoder.double(), latents.double()
    whole = decoder(latents).clamp(-1, 1)
    found = DecodeRuntime(decoder, DecodeSettings(dtype=torch.float64, **settings)).decode(latents)
    return float((found - whole).abs().max()) / 2


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_frames_stay(small: list[tuple[int, int]], chunk: int | None, layout: str) -> None:
    """Also where a step begins with the state of the one before it."""
    decoder = toy_decoder(DECODER_SPECS["flash"])
    assert difference(decoder, LATENTS, chunk=chunk, memory_format=layout) < 1e-12  # rounding
    assert {rows for _, rows in small} == {3} and {frames for frames, _ in small} >= {1}
    assert any(frames > 1 for frames, _ in small) or chunk == 1


def test_the_state_stays(small: list[tuple[int, int]]) -> None:
    spec = next(b for a, b in DECODER_SPECS["flash"].blocks() if a == "mid.0")
    block = ResBlock(spec, "mid.0").eval().requires_grad_(False)  # type: ignore[arg-type]
    x = channels_last(torch.randn(1, spec.in_width, 4, 11, 3))
    whole: dict[str, Tensor] = {}
    parted: dict[str, Tensor] = {}
    with torch.no_grad():
        frames = block(x[:, :, :2], None, whole), block(x[:, :, 2:], whole, whole)
        with bands():  # one dictionary for both, as a decoding has it
            found = block(x[:, :, :2], None, parted), block(x[:, :, 2:], parted, parted)
    assert len(small) == 2
    for a, b in zip(frames, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert whole.keys() == parted.keys() == {"mid.0.conv1", "mid.0.conv2"}
    for address in whole:
        torch.testing.assert_close(whole[address], parted[address], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RESBLOCK_FAMILIES)
def test_every_family(name: str, small: list[tuple[int, int]]) -> None:
    spec = flash_of(name)
    latents = torch.randn(1, spec.latent_width, 1 if spec.still else 2, 4, 3)
    assert difference(toy_decoder(spec), latents) < 1e-12
    norms = [norm for _, block in spec.blocks() for norm, _ in block.norms.values()]
    over_frames = [norm for norm in norms if norm.groups is not None]
    if over_frames:  # statistics of whole frames: no rows apart, but frames
        assert all(norm.over == "clip" for norm in over_frames) or latents.shape[2] == 1 or small
    else:
        assert small


def test_only_a_decoding_runs_in_bands(small: list[tuple[int, int]]) -> None:
    """What watches the layers of a decoder sees whole clips; so do gradients and compiled steps."""
    decoder = toy_decoder(DECODER_SPECS["flash"])
    with torch.no_grad():
        decoder(LATENTS)
    assert not small
    with bands(), torch.enable_grad():
        decoder(LATENTS)
    assert not small
    with torch.no_grad(), bands():
        decoder(LATENTS)
    assert small


def test_small_clips_and_dense_layers_stay_whole() -> None:
    specs = {address: block for address, block in DECODER_SPECS["original"].blocks() if isinstance(block, ResBlockSpec)}
    assert all(BandShape.of(block) is None for address, block in specs.items())
    light = {address: block for address, block in DECODER_SPECS["flash"].blocks() if isinstance(block, ResBlockSpec)}
    shapes = {address: BandShape.of(block) for address, block in light.items()}
    framewise, temporal = shapes["up3.0"], shapes["mid.0"]
    assert framewise is not None and framewise.takes_frames_apart and framewise.halo == 2
    assert temporal is not None and not temporal.takes_frames_apart
    assert framewise.size(9, 64, 64, 4) is None
    assert framewise.size(9, 4096, 1024, 4) == (1, (4 << 20) // (4 * framewise.width * 1024))
    assert temporal.size(9, 4096, 1024, 4) == (9, (16 << 20) // (9 * 4 * temporal.width * 1024))
    assert temporal.size(9, 4096, 1024, 40) == (9, 16)
    assert temporal.size(1, 4096, 4, 4) is None
