"""Our HunyuanVideo against diffusers' `AutoencoderKLHunyuanVideo`: same random weights, same numbers.

In float64 the functions are the same (1e-14 of the range is measured); in float32 sums in another order leave 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.families.hunyuanvideo.spec import hunyuan_decoder_spec, hunyuan_encoder_spec
from tests.hunyuan_toy import hunyuan_config, random_hunyuan
from tests.parity.oracles import share_of_range

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4
DOUBLE_BOUND = 1e-11


def saved(oracle: nn.Module, folder: Path) -> Checkpoint:
    oracle.save_pretrained(folder)  # type: ignore[operator]
    return load_checkpoint(folder, builtins={})


def whole(coder: Any) -> Any:
    """The coder without tiles in time."""
    coder.spec = coder.spec.model_copy(update={"temporal_tiles": None})
    return coder


@torch.no_grad()
def differences(oracle: Any, found: Checkpoint, *, num_frames: int, height: int, width: int) -> tuple[float, float]:
    """Of the latents and, from the oracle's latents of fresh noise, of the frames, as shares of their ranges."""
    dtype = next(oracle.parameters()).dtype
    pixels = torch.rand(1, 3, num_frames, height, width, dtype=dtype) * 2 - 1
    encoded = oracle.encode(pixels).latent_dist.mode()
    latents = torch.randn(encoded.shape, dtype=dtype)
    expected = oracle.decode(latents).sample.clamp(-1, 1)
    errors = (
        share_of_range(encode(found.require_encoder().to(dtype), pixels), encoded),
        share_of_range(decode(found.require_decoder().to(dtype), latents), expected),
    )
    print(f"{num_frames} frames of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    return errors


LENGTHS = (1, 5, 13, 17, 21, 29, 41)
"""Frames: clips of one tile, and of two to four whose last has 2, 3 or 5 latents."""


@pytest.mark.parametrize("mode", ["tiles", "whole clip"])
def test_the_same_function(mode: str, tmp_path: Path) -> None:
    oracle: Any = random_hunyuan(hunyuan_config())
    found = saved(oracle, tmp_path)
    assert (found.family, found.notes) == ("hunyuanvideo", ())
    assert found.latent_mean == (0.0,) * 16
    assert found.latent_std == pytest.approx((1 / 0.476986,) * 16)
    oracle.use_framewise_encoding = oracle.use_framewise_decoding = mode == "tiles"
    if mode == "whole clip":
        whole(found.require_encoder()), whole(found.require_decoder())
    assert max(differences(oracle, found, num_frames=9, height=32, width=48)) <= RANGE_BOUND
    oracle.double()
    for num_frames in LENGTHS:
        assert max(differences(oracle, found, num_frames=num_frames, height=16, width=24)) <= DOUBLE_BOUND


@pytest.mark.bench
@pytest.mark.parametrize("mode", ["tiles", "whole clip"])
def test_full_size(mode: str, tmp_path: Path) -> None:
    oracle: Any = random_hunyuan(hunyuan_config(128, 32))
    found = saved(oracle, tmp_path)
    assert found.require_decoder().spec == hunyuan_decoder_spec(128)
    assert found.require_encoder().spec == hunyuan_encoder_spec(128)
    oracle.use_framewise_encoding = oracle.use_framewise_decoding = mode == "tiles"
    if mode == "whole clip":
        whole(found.require_encoder()), whole(found.require_decoder())
    assert max(differences(oracle, found, num_frames=21, height=32, width=48)) <= RANGE_BOUND


# --- however the clip comes in -----------------------------------------------------------------


def at_once(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    return runtime.decode(latents)


def in_parts(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    parts = list(runtime.iter_parts(latents.split([2, 1, 3, latents.shape[2] - 6], dim=2)))
    assert [part.shape[2] for part in parts] == [5, 4, 12, 4 * (latents.shape[2] - 6)]
    return torch.cat(parts, dim=2)


def streamed(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    stream = runtime.open(latents.shape[3], latents.shape[4])
    frames = [stream.step(part) for part in latents.split(1, dim=2)]
    return torch.cat([*frames, stream.flush()], dim=2)


@pytest.mark.parametrize("way", [at_once, in_parts, streamed])
@pytest.mark.parametrize("settings", [DecodeSettings(), DecodeSettings(chunk=2), DecodeSettings(whole_clip=True)])
@pytest.mark.parametrize("num_latents", [7, 8, 11])
@torch.no_grad()
def test_however_a_clip_comes_in(
    num_latents: int, settings: DecodeSettings, way: Callable[[DecodeRuntime, Tensor], Tensor], tmp_path: Path
) -> None:
    oracle: Any = random_hunyuan(hunyuan_config(4, 2))
    decoder = saved(oracle, tmp_path).require_decoder()
    oracle.use_framewise_decoding = not settings.whole_clip
    latents = torch.randn(1, 16, num_latents, 2, 3)
    expected = oracle.decode(latents).sample.clamp(-1, 1)
    assert share_of_range(way(DecodeRuntime(decoder, settings), latents), expected) <= RANGE_BOUND
