"""Names of the blocks of HunyuanVideo 1.5's VAE in foreign checkpoints.

`hunyuanvideo-1.5-original`: Tencent's file, and ComfyUI's; `hunyuanvideo-1.5-diffusers`: `AutoencoderKLHunyuanVideo15`.
In both, the layer of a resampler has all channels for one position of a cell before those for the next; here all
positions of a channel come together.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from flashvaed_cli.families.hunyuanvideo15.spec import GROWS, MULTIPLIERS, NAME
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.rows import reorder_rows
from flashvaed_cli.families.stable_diffusion.config import statistics_config
from flashvaed_cli.families.stable_diffusion.names import join_attention, split_attention

_NUM_RESBLOCKS: dict[Role, int] = {"decoder": 3, "encoder": 2}
_ATTENTION = {"original": ("q", "k", "v", "proj_out"), "diffusers": ("to_q", "to_k", "to_v", "proj_out")}


def _places(kind: str) -> dict[Role, dict[str, str]]:
    found: dict[Role, dict[str, str]] = {}
    for role, number in _NUM_RESBLOCKS.items():
        way = "up" if role == "decoder" else "down"
        run = (
            "mid.block_1 mid.attn_1 mid.block_2"
            if kind == "original"
            else ("mid_block.resnets.0 mid_block.attentions.0 mid_block.resnets.1")
        )
        places = {f"mid.{i}": f"{role}.{name}" for i, name in enumerate(run.split())}
        places |= {"conv_in.0": f"{role}.conv_in.conv", "head.0": role}
        places |= {f"{stage}.bypass": f"{role}.{stage}_shortcut" for stage in ("conv_in", "head")}
        for i in range(len(MULTIPLIERS)):
            for j in range(number):
                block = f"{way}.{i}.block.{j}" if kind == "original" else f"{way}_blocks.{i}.resnets.{j}"
                places[f"{way}{i}.{j}"] = f"{role}.{block}"
            places[f"{way}{i}.{number}"] = f"{role}.{_resampler(kind, way, i)}"
        found[role] = places
    return found


def _resampler(kind: str, way: str, index: int) -> str:
    return f"{way}.{index}.{way}sample" if kind == "original" else f"{way}_blocks.{index}.{way}samplers.0"


def _landmarks(places: Mapping[Role, Mapping[str, str]]) -> dict[Role, tuple[str, ...]]:
    """The norms of residual blocks, and the layers of resamplers."""
    found: dict[Role, tuple[str, ...]] = {}
    for role, number in _NUM_RESBLOCKS.items():
        stages = [f"{'up' if role == 'decoder' else 'down'}{i}" for i in range(len(MULTIPLIERS))]
        blocks = ["mid.0", "mid.2", *(f"{stage}.{j}" for stage in stages for j in range(number))]
        norms = [f"{places[role][block]}.norm{n}.gamma" for block in blocks for n in (1, 2)]
        found[role] = (*norms, *(f"{places[role][f'{stage}.{number}']}.conv.conv.weight" for stage in stages[:-1]))
    return found


def _reordered(kind: str, tensors: Mapping[str, Tensor], *, back: bool) -> dict[str, Tensor]:
    """The outputs of the decoder's resamplers in our order, or in the files'."""
    reordered = dict(tensors)
    for index, factor in enumerate(GROWS):
        cell = prod(factor)
        reorder_rows(
            reordered,
            f"decoder.{_resampler(kind, 'up', index)}.conv.conv",
            parts=(-1, cell) if back else (cell, -1),
            order=(1, 0),
        )
    return reordered


def _prepare(kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attention in one tensor, resamplers in our order."""
    return _reordered(kind, join_attention((_ATTENTION[kind],), tensors, config), back=False)


def _finish(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse; attention has the axes of layers and norms for clips."""
    parts = _ATTENTION[kind]
    finished = _reordered(kind, split_attention(parts, tensors, is_linear=False), back=True)
    place = "mid.attn_1" if kind == "original" else "mid_block.attentions.0"
    for role in _NUM_RESBLOCKS:
        for name in (f"{role}.{place}.norm.gamma", *(f"{role}.{place}.{part}.weight" for part in parts)):
            if name in finished:
                finished[name] = finished[name].unsqueeze(-1)
    return finished


def _layout(kind: str) -> Layout:
    is_diffusers, places = kind == "diffusers", _places(kind)
    return Layout(
        name=f"{NAME}-{kind}",
        family=NAME,
        places=places,
        layers={
            "conv": {"conv": ""},
            "resblock": {
                "norm1": "norm1",
                "conv1": "conv1.conv",
                "norm2": "norm2",
                "conv2": "conv2.conv",
                "shortcut": "conv_shortcut" if is_diffusers else "nin_shortcut",
            },
            "attention": {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
            "cell_upsample": {"conv": "conv.conv", "first": "first"},
            "cell_downsample": {"conv": "conv.conv"},
            "head": {"norm": "norm_out", "conv": "conv_out.conv"},
        },
        config_class="AutoencoderKLHunyuanVideo15" if is_diffusers else None,
        prepare=partial(_prepare, kind),
        finish=partial(_finish, kind),
        statistics_config=statistics_config,
        landmarks=_landmarks(places),
        arguments=(
            "in_channels",
            "out_channels",
            "latent_channels",
            "block_out_channels",
            "layers_per_block",
            "spatial_compression_ratio",
            "temporal_compression_ratio",
            "downsample_match_channel",
            "upsample_match_channel",
            "scaling_factor",
        )
        if is_diffusers
        else (),
    )


HUNYUAN_15_ORIGINAL, HUNYUAN_15_DIFFUSERS = _layout("original"), _layout("diffusers")
