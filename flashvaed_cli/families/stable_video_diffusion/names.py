"""Names of the blocks of Stable Video Diffusion's VAE in foreign checkpoints.

`stable-video-diffusion-original`: Stability AI's single file (without `first_stage_model.`), where the block in time is
the `time_stack` of a residual block; `stable-video-diffusion-diffusers`: `AutoencoderKLTemporalDecoder`.

Both have a number for each pair of residual blocks, `mix_factor`: its sigmoid scales the residual of the block in time.
Here it is part of that block's second layer. Files are written with 0, a share of one half, and that layer doubled,
which is exact.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.stable_diffusion.config import QUANT_KEYS, statistics_config
from flashvaed_cli.families.stable_diffusion.names import (
    DIFFUSERS_ATTENTION,
    LAYERS,
    ORIGINAL_ATTENTION,
    deny_axes,
    diffusers_places,
    finish_attention,
    has_quant_layers,
    join_attention,
    original_places,
)
from flashvaed_cli.families.stable_video_diffusion.spec import LATENT_WIDTH, STABLE_VIDEO_DIFFUSION

_NUM_RESBLOCKS = {"mid": 2, "up0": 3, "up1": 3, "up2": 3, "up3": 3}
_MIX = "mix_factor"
_HALF = 0.5  # the sigmoid of the 0 that is written


def _places(kind: str) -> dict[Role, dict[str, str]]:
    """Those of Stable Diffusion, with the residual blocks of the decoder in pairs."""
    places = original_places() if kind == "original" else diffusers_places()
    old, new = places["decoder"], {}
    on_frames, in_time = ("", ".time_stack") if kind == "original" else (".spatial_res_block", ".temporal_res_block")
    for name in ("conv_in", "head"):
        new[f"{name}.0"] = old[f"{name}.0"]
    for stage, number in _NUM_RESBLOCKS.items():
        singles = [old[f"{stage}.{i}"] for i in range(number + 1)]
        attention, upsampler = (singles.pop(1), None) if stage == "mid" else (None, singles.pop())
        blocks = [f"{place}{part}" for place in singles for part in (on_frames, in_time)]
        if attention is not None:
            blocks.insert(2, attention)
        elif stage != "up3":
            assert upsampler is not None
            blocks.append(upsampler)
        new |= {f"{stage}.{i}": place for i, place in enumerate(blocks)}
    new["time_out.0"] = "decoder.conv_out.time_mix_conv" if kind == "original" else "decoder.time_conv_out"
    return {"decoder": new, "encoder": places["encoder"]}


# Layer names of the blocks in time in the original's file, which has them as parts of two sequences.
_ORIGINAL_TIME = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_SECOND_LAYERS = {
    "original": (".time_stack.conv2", f".{_MIX}"),
    "diffusers": (".temporal_res_block.conv2", f".time_mixer.{_MIX}"),
}
"""Names of the second layer of a block in time and of its share, after the place of the pair."""


def _renamed(tensors: Mapping[str, Tensor], *, back: bool) -> dict[str, Tensor]:
    """The original's layers in time under the names of its other residual blocks' layers, or the reverse."""
    pairs = [(end, start) if back else (start, end) for end, start in _ORIGINAL_TIME.items()]
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = re.sub(rf"\.time_stack\.{re.escape(old)}\.", f".time_stack.{new}.", name)
        renamed[name] = tensor
    return renamed


def _second_layer(tensors: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """The tensors that scale a layer's output: kernel and bias; of a separable layer, those of its last part."""
    for end in ("weight", "bias", "pointwise_conv.weight", "pointwise_conv.bias"):
        if f"{name}.{end}" in tensors:
            yield f"{name}.{end}"


def _prepare(kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attention in one tensor, and shares folded into layers.

    Raises:
        ArtifactError: the share of a block is absent, or not a single number.
    """
    attention = ORIGINAL_ATTENTION if kind == "original" else DIFFUSERS_ATTENTION
    prepared = join_attention(attention, tensors, config)
    prepared = _renamed(prepared, back=False) if kind == "original" else prepared
    layer, mix = _SECOND_LAYERS[kind]
    for place in dict.fromkeys(name.partition(f"{layer}.")[0] for name in prepared if f"{layer}." in name):
        factor = prepared.pop(f"{place}{mix}", None)
        if factor is None or factor.numel() != 1:
            found = "is absent" if factor is None else f"holds {factor.numel()} numbers"
            raise ArtifactError(
                f"{place}{mix} {found}: it is a single number, by which frames are mixed. Download it again."
            )
        share = torch.sigmoid(factor.double())
        for name in _second_layer(prepared, f"{place}{layer}"):
            prepared[name] = (prepared[name].double() * share).float()
    return prepared


def _finish(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse; diffusers' class always has the encoder's 1x1 layer, which is an identity if there is none."""
    attention = ORIGINAL_ATTENTION if kind == "original" else DIFFUSERS_ATTENTION
    finished = finish_attention(attention[0], kind == "diffusers", tensors)
    layer, mix = _SECOND_LAYERS[kind]
    for place in dict.fromkeys(name.partition(f"{layer}.")[0] for name in finished if f"{layer}." in name):
        finished[f"{place}{mix}"] = torch.zeros(1)
        for name in _second_layer(finished, f"{place}{layer}"):
            finished[name] = finished[name] / _HALF
    if kind == "original":
        return _renamed(finished, back=True)
    if "encoder.conv_in.weight" in finished and "quant_conv.weight" not in finished:
        finished["quant_conv.weight"] = torch.eye(2 * LATENT_WIDTH)[:, :, None, None]
        finished["quant_conv.bias"] = torch.zeros(2 * LATENT_WIDTH)
    return finished


def _implied(names: Iterable[str]) -> dict[str, Any]:
    """Whether the encoder has a 1x1 layer; the decoder never has, so there is no place for one."""
    return {**has_quant_layers(names), QUANT_KEYS["decoder"]: False}


def _landmarks() -> tuple[str, ...]:
    """Names of the original's decoder that Stable Diffusion's lacks; it has all of those too."""
    layer, mix = _SECOND_LAYERS["original"]
    in_time = layer.removesuffix(".conv2")
    places = [place for place in _places("original")["decoder"].values() if place.endswith(in_time)]
    ends = (f"{in_time}.{_ORIGINAL_TIME['norm1']}.weight", mix, ".norm1.weight", ".norm2.weight")
    return tuple(f"{place.removesuffix(in_time)}{end}" for place in places for end in ends)


def _layout(kind: str) -> Layout:
    is_diffusers = kind == "diffusers"
    return Layout(
        name=f"{STABLE_VIDEO_DIFFUSION.name}-{kind}",
        family=STABLE_VIDEO_DIFFUSION.name,
        places=_places(kind),
        layers=LAYERS[kind],
        config_class="AutoencoderKLTemporalDecoder" if is_diffusers else None,
        gain="weight",
        prepare=partial(_prepare, kind),
        implied=_implied,
        finish=partial(_finish, kind),
        denied=partial(deny_axes, 4),
        statistics_config=statistics_config,
        landmarks={} if is_diffusers else {"decoder": _landmarks()},
        arguments=(
            "in_channels",
            "out_channels",
            "down_block_types",
            "block_out_channels",
            "layers_per_block",
            "latent_channels",
            "scaling_factor",
        )
        if is_diffusers
        else (),
    )


SVD_ORIGINAL, SVD_DIFFUSERS = _layout("original"), _layout("diffusers")
