"""Names of the blocks of SeedVR2's VAE in its files (`ema_vae.pth`, `ema_vae_fp16.safetensors`): as in diffusers' image
VAE, with the layers of kernels in time under the same names.

A resampler's pointwise layer has its outputs by row, column and frame of a cell, then by channel; here all positions of
a channel come together, by frame, row and column.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.rows import reorder_rows
from flashvaed_cli.families.seedvr2.spec import GROWS, NAME
from flashvaed_cli.families.stable_diffusion.names import (
    DIFFUSERS_ATTENTION,
    LAYERS,
    deny_axes,
    diffusers_places,
    join_attention,
    split_attention,
)

_UPSCALE = "upscale_conv"


def _places() -> dict[Role, dict[str, str]]:
    """Those of Stable Diffusion; a shuffle and the layer after it are a stage of their own."""
    places = diffusers_places()
    for i in range(len(GROWS)):
        sampler = places["decoder"].pop(f"up{i}.3")
        places["decoder"] |= {f"up{i}_grown.0": sampler, f"up{i}_grown.1": f"{sampler}.conv"}
    return {role: {at: one for at, one in coder.items() if "quant" not in at} for role, coder in places.items()}


def _landmarks(places: Mapping[Role, Mapping[str, str]]) -> dict[Role, tuple[str, ...]]:
    """The norms of residual blocks, and the layers of resamplers."""
    found: dict[Role, tuple[str, ...]] = {}
    for role, coder in places.items():
        resblocks = [place for place in coder.values() if ".resnets." in place]
        layer = _UPSCALE if role == "decoder" else "conv"
        samplers = [place for place in coder.values() if place.endswith("samplers.0")]
        norms = [f"{place}.{norm}.weight" for place in resblocks for norm in ("norm1", "norm2")]
        found[role] = (*norms, *(f"{place}.{layer}.weight" for place in samplers[: len(GROWS)]))
    return found


def _reordered(tensors: Mapping[str, Tensor], *, back: bool) -> dict[str, Tensor]:
    """The outputs of the decoder's pointwise layers in our order, or in the files'."""
    reordered = dict(tensors)
    for index, (ft, fh, fw) in enumerate(GROWS):
        parts, order = ((-1, ft, fh, fw), (2, 3, 1, 0)) if back else ((fh, fw, ft, -1), (3, 2, 0, 1))
        reorder_rows(reordered, f"decoder.up_blocks.{index}.upsamplers.0.{_UPSCALE}", parts, order)
    return reordered


def _prepare(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attention in one tensor, resamplers in our order."""
    return _reordered(join_attention(DIFFUSERS_ATTENTION, tensors, config), back=False)


def _finish(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse."""
    return _reordered(split_attention(DIFFUSERS_ATTENTION[0], tensors, is_linear=True), back=True)


SEEDVR2_ORIGINAL = Layout(
    name=f"{NAME}-original",
    family=NAME,
    places=_places(),
    layers={**LAYERS["diffusers"], "shuffle_upsample": {"conv": _UPSCALE}, "strided_downsample": {"conv": "conv"}},
    gain="weight",
    prepare=_prepare,
    finish=_finish,
    denied=partial(deny_axes, 5),
    landmarks=_landmarks(_places()),
)
