"""Encoders are solved as decoders are: strided layers, frames that halve, and what enters them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.rows import finer_positions, gather_patches
from tests.toy import toy_vae

SETTINGS = FitSettings(dampening_frac=1e-9)


def toy_encoder() -> Encoder:
    return toy_vae(0)[1].eval().requires_grad_(False)


def test_finer_positions_are_what_a_strided_kernel_reads() -> None:
    x = torch.randn(2, 3, 5, 6, 8)
    weight = torch.randn(4, 3, 3, 3)
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    strided = F.conv2d(frames, weight, stride=2).unflatten(0, (2, 5)).transpose(1, 2)  # [2, 4, 5, 3, 4]
    at = torch.arange(2 * 5 * 3 * 4)
    centres = finer_positions(at, x.shape, step=(1, 2, 2), first=(0, 1, 1))
    rows = gather_patches(x, (1, 3, 3), centres).flatten(1) @ weight.flatten(1).T
    assert torch.allclose(rows, strided.permute(0, 2, 3, 4, 1).reshape(-1, 4), atol=1e-5)


def test_finer_positions_in_time() -> None:
    x = torch.randn(1, 3, 9, 2, 2)
    weight = torch.randn(4, 3, 3, 1, 1)
    halved = F.conv3d(x, weight, stride=(2, 1, 1))  # [1, 4, 4, 2, 2]
    last = finer_positions(torch.arange(16), x.shape, step=(2, 1, 1), first=(2, 0, 0))
    rows = gather_patches(x, (3, 1, 1), last).flatten(1) @ weight.flatten(1).T
    assert torch.allclose(rows, halved.permute(0, 2, 3, 4, 1).reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize("layer", ["spatial", "temporal"])
def test_a_spoilt_downsampler_is_found_again(layer: str) -> None:
    encoder = toy_encoder()
    address, block = next(
        (address, block) for address, block in encoder.blocks() if getattr(block, layer, None) is not None
    )
    spoilt = copy.deepcopy(encoder)
    getattr(spoilt.at(address), layer).weight.add_(0.3)
    clips = [torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(2)]
    errors = reconstruct_coder(
        encoder, spoilt, {}, clips, first_block=address, settings=SETTINGS, progress=SilentProgress()
    )
    assert f"{address}.{layer}" in [error.address for error in errors]
    weight = getattr(block, layer).weight
    assert torch.allclose(getattr(spoilt.at(address), layer).weight, weight, atol=1e-3 * weight.abs().max().item())
    assert torch.allclose(spoilt(clips[0]), encoder(clips[0]), atol=1e-3)
