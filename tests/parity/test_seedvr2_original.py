"""Our SeedVR2 against its authors' class, whose code is cloned (or found in `FLASHVAED_BENCH_PEERS`): random weights.

Not part of the suite, which has no network; there, `test_seedvr2.py` compares with the same arithmetic written out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.decoders.run.streaming import decode, encode
from tests.bench.peers import NotAtHand, clone_of
from tests.parity.oracles import RANGE_BOUND, randomised, share_of_range

pytestmark = pytest.mark.bench


@pytest.fixture
def their_vae(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the class; the clone's packages have common names, and are forgotten afterwards."""
    try:
        clone = clone_of("SeedVR")
    except NotAtHand as error:
        pytest.skip(str(error))
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(clone.resolve()))
    try:
        yield importlib.import_module("models.video_vae_v3.modules.attn_video_vae")
    except ImportError as error:
        pytest.skip(f"SeedVR's code: {error}")
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "common"):
                del sys.modules[name]


@pytest.mark.parametrize("base_width", [32, 128], ids=["small", "full size"])
@torch.no_grad()
def test_the_same_function(their_vae: Any, base_width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    oracle = their_vae.VideoAutoencoderKL(
        block_out_channels=[base_width * multiple for multiple in (1, 2, 4, 4)],
        down_block_types=["DownEncoderBlock3D"] * 4,
        up_block_types=["UpDecoderBlock3D"] * 4,
        latent_channels=16,
        layers_per_block=2,
        norm_num_groups=32,
        slicing_sample_min_size=4,
        temporal_scale_num=2,
        inflation_mode="pad",
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomised(oracle)
    save_file(oracle.state_dict(), tmp_path / "ema_vae.safetensors")
    found = load_checkpoint(tmp_path / "ema_vae.safetensors", builtins={})
    assert (found.family, found.notes) == ("seedvr2", ())
    for num_frames in (1, 9, 17):
        pixels = torch.rand(1, 3, num_frames, 32, 48) * 2 - 1
        expected_latents = oracle.encode(pixels).latent_dist.mode()
        expected = oracle.decode(expected_latents).sample
        errors = (
            share_of_range(encode(found.require_encoder(), pixels), expected_latents),
            share_of_range(decode(found.require_decoder(), expected_latents), expected.clamp(-1, 1)),
        )
        print(f"{num_frames} frames: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
        assert max(errors) <= RANGE_BOUND
