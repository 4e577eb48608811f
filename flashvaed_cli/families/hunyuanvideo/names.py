"""Names of the blocks of HunyuanVideo's VAE in foreign checkpoints: as in diffusers' image VAE, layers in `.conv`.

`hunyuanvideo-original`: Tencent's `pytorch_model.pt`, whose tensors have the same names in diffusers;
`hunyuanvideo-diffusers`: `AutoencoderKLHunyuanVideo`.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from flashvaed_cli.families.hunyuanvideo.spec import HUNYUAN_VIDEO
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.stable_diffusion.config import statistics_config
from flashvaed_cli.families.stable_diffusion.names import (
    DIFFUSERS_ATTENTION,
    diffusers_places,
    join_attention,
    split_attention,
)


def _places() -> dict[Role, dict[str, str]]:
    places = diffusers_places()
    for role, coder in places.items():
        coder["conv_in.0"] = f"{role}.conv_in.conv"
    return places


def _finish(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention as three linear layers and a linear projection."""
    return split_attention(DIFFUSERS_ATTENTION[0], tensors, is_linear=True)


HUNYUAN_DIFFUSERS = Layout(
    name="hunyuanvideo-diffusers",
    family=HUNYUAN_VIDEO.name,
    places=_places(),
    layers={
        "conv": {"conv": ""},
        "resblock": {
            "norm1": "norm1",
            "conv1": "conv1.conv",
            "norm2": "norm2",
            "conv2": "conv2.conv",
            "shortcut": "conv_shortcut.conv",
        },
        "attention": {"norm": "group_norm", "qkv": "qkv", "proj": "to_out.0"},
        "upsample": {"temporal": "time_conv", "spatial": "conv.conv"},
        "strided_downsample": {"conv": "conv.conv"},
        "head": {"norm": "conv_norm_out", "conv": "conv_out.conv"},
    },
    config_class="AutoencoderKLHunyuanVideo",
    gain="weight",
    prepare=partial(join_attention, DIFFUSERS_ATTENTION),
    finish=_finish,
    statistics_config=statistics_config,
    arguments=(
        "in_channels",
        "out_channels",
        "latent_channels",
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "act_fn",
        "norm_num_groups",
        "scaling_factor",
        "spatial_compression_ratio",
        "temporal_compression_ratio",
        "mid_block_add_attention",
    ),
)
HUNYUAN_ORIGINAL = replace(HUNYUAN_DIFFUSERS, name="hunyuanvideo-original", config_class=None, arguments=())
