"""Names of the blocks of an `AutoencoderKL` in foreign checkpoints.

`NAME-original`: the single file of CompVis and Stability AI (without `first_stage_model.`), and FLUX.1's `ae`, where
the decoder's stages are numbered from the frames back to the latents and attention consists of 1x1 convolutions.
`NAME-diffusers`: `AutoencoderKL`, also with the attention names of its oldest files. All variants have the same names;
they differ in latent width and configuration.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.stable_diffusion.config import said_of_others, statistics_config
from flashvaed_cli.families.stable_diffusion.spec import FLUX_1, SD, SD_3, SDXL

_VARIANTS = (SD, SDXL, SD_3, FLUX_1)
_NUM_STAGES = 4
_NUM_RESBLOCKS = {"decoder": 3, "encoder": 2}
_JOINED = "qkv"
# Attention's names for queries, keys, values and the projection, in the order in which they are tried.
ORIGINAL_ATTENTION = (("q", "k", "v", "proj_out"),)
DIFFUSERS_ATTENTION = (("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn"))
# Parts of names that only decoders with layers in time have, beside all names of those without.
_IN_TIME = (".temporal_res_block.", ".time_stack.")
# In a trainer's file: its loss with a discriminator, a running average under names without dots.
_NOT_THE_VAE = ("loss.", "model_ema.")


def original_places() -> dict[Role, dict[str, str]]:
    decoder = {"post_quant.0": "post_quant_conv", "conv_in.0": "decoder.conv_in", "head.0": "decoder"}
    encoder = {"conv_in.0": "encoder.conv_in", "head.0": "encoder", "quant.0": "quant_conv"}
    for role, places in (("decoder", decoder), ("encoder", encoder)):
        for i, name in enumerate(("block_1", "attn_1", "block_2")):
            places[f"mid.{i}"] = f"{role}.mid.{name}"
        for i in range(_NUM_STAGES):
            stage, at = (f"up{_NUM_STAGES - 1 - i}", "up") if role == "decoder" else (f"down{i}", "down")
            number = _NUM_RESBLOCKS[role]
            for j in range(number):
                places[f"{stage}.{j}"] = f"{role}.{at}.{i}.block.{j}"
            places[f"{stage}.{number}"] = f"{role}.{at}.{i}.{at}sample"
    return {"decoder": decoder, "encoder": encoder}


def diffusers_places() -> dict[Role, dict[str, str]]:
    decoder = {"post_quant.0": "post_quant_conv", "conv_in.0": "decoder.conv_in", "head.0": "decoder"}
    encoder = {"conv_in.0": "encoder.conv_in", "head.0": "encoder", "quant.0": "quant_conv"}
    for role, places in (("decoder", decoder), ("encoder", encoder)):
        mid, stage = f"{role}.mid_block", "up" if role == "decoder" else "down"
        places |= {"mid.0": f"{mid}.resnets.0", "mid.1": f"{mid}.attentions.0", "mid.2": f"{mid}.resnets.1"}
        number = _NUM_RESBLOCKS[role]
        for i in range(_NUM_STAGES):
            at = f"{role}.{stage}_blocks.{i}"
            places |= {f"{stage}{i}.{j}": f"{at}.resnets.{j}" for j in range(number)}
            places[f"{stage}{i}.{number}"] = f"{at}.{stage}samplers.0"
    return {"decoder": decoder, "encoder": encoder}


def join_attention(
    attention: tuple[tuple[str, ...], ...], tensors: Mapping[str, Tensor], _config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Join queries, keys and values to one tensor, and give the projection its current name."""
    prepared = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_THE_VAE)}
    for *parts, proj in attention:
        for first in [name for name in prepared if f".{parts[0]}." in name]:
            place, _, end = first.rpartition(f".{parts[0]}.")
            names = [f"{place}.{part}.{end}" for part in parts]
            if all(name in prepared and prepared[name].shape == prepared[first].shape for name in names):
                prepared[f"{place}.{_JOINED}.{end}"] = torch.cat([prepared.pop(name) for name in names])
                if (old := f"{place}.{proj}.{end}") in prepared:
                    prepared[f"{place}.{attention[0][-1]}.{end}"] = prepared.pop(old)
    return prepared


def finish_attention(attention: tuple[str, ...], is_linear: bool, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: attention in parts, and dense kernels without a time axis."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_separable = ".depthwise_conv." in name or ".pointwise_conv." in name
        flat[name] = tensor.squeeze(2) if tensor.ndim == 5 and not is_separable else tensor
    return split_attention(attention, flat, is_linear=is_linear)


def split_attention(attention: tuple[str, ...], tensors: Mapping[str, Tensor], *, is_linear: bool) -> dict[str, Tensor]:
    """Queries, keys, values and the projection as separate tensors: linear layers, or 1x1 convolutions."""
    finished: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, _, end = name.rpartition(f".{_JOINED}.")
        if not place:
            is_projection = is_linear and name.endswith(f".{attention[-1]}.weight")
            finished[name] = tensor.flatten(1) if is_projection else tensor
            continue
        tensor = tensor.flatten(1) if is_linear and tensor.ndim > 1 else tensor
        finished |= {f"{place}.{part}.{end}": one for part, one in zip(attention[:-1], tensor.chunk(3), strict=True)}
    return finished


def has_quant_layers(names: Iterable[str]) -> dict[str, Any]:
    """Whether there are 1x1 layers on the latents, as keys of a configuration."""
    names = list(names)
    keys = {"use_quant_conv": "quant_conv.", "use_post_quant_conv": "post_quant_conv."}
    return {key: any(name.startswith(start) for name in names) for key, start in keys.items()}


def deny_axes(num_axes: int, shapes: Mapping[str, tuple[int, ...]], _config: Mapping[str, Any]) -> str | None:
    """What rules out a layout whose first layers have so many axes, 4 on frames and 5 in time; None: nothing."""
    for role in ("decoder", "encoder"):
        found = len(shapes.get(f"{role}.conv_in.weight", ()))
        if found not in (0, num_axes):
            return f"its first layer has a kernel of {found} axes, not {num_axes}"
    return None


def _denial(family: Family) -> Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], str | None]:
    """What rules out a variant, by shapes and configuration: all variants have the same names."""
    alike = [one for one in _VARIANTS if one is not family and one.latent_width == family.latent_width]
    others = [1 / one.latent_std[0] for one in alike]
    own = 1 / family.latent_std[0] if family.latent_std else None  # FLUX.2's are in its files

    def deny(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
        if in_time := next((name for name in shapes if any(part in name for part in _IN_TIME)), None):
            return f"no place for {in_time}, a layer in time"
        if (fault := deny_axes(4, shapes, config)) is not None:
            return fault
        entry, end = shapes.get("decoder.conv_in.weight", ()), shapes.get("encoder.conv_out.weight", ())
        found = entry[1] if len(entry) == 4 else end[0] // 2 if len(end) == 4 else None
        if found is not None and found != family.latent_width:
            return f"it has {found} latent channels, not {family.latent_width}"
        if own is None:
            return None
        return said_of_others(family.latent_width, round(own, 9), [round(one, 9) for one in others], config)

    return deny


_RESBLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_PLACES = {"original": original_places(), "diffusers": diffusers_places()}
LAYERS: dict[str, dict[str, dict[str, str]]] = {
    "original": {
        "conv": {"conv": ""},
        "resblock": {**_RESBLOCK, "shortcut": "nin_shortcut"},
        "attention": {"norm": "norm", "qkv": _JOINED, "proj": "proj_out"},
        "upsample": {"temporal": "time_conv", "spatial": "conv"},
        "downsample": {"temporal": "time_conv", "spatial": "conv"},
        "head": {"norm": "norm_out", "conv": "conv_out"},
    },
    "diffusers": {
        "conv": {"conv": ""},
        "resblock": {**_RESBLOCK, "shortcut": "conv_shortcut"},
        "attention": {"norm": "group_norm", "qkv": _JOINED, "proj": "to_out.0"},
        "upsample": {"temporal": "time_conv", "spatial": "conv"},
        "downsample": {"temporal": "time_conv", "spatial": "conv"},
        "head": {"norm": "conv_norm_out", "conv": "conv_out"},
    },
}
ARGUMENTS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)


def kl_layout(family: Family, kind: str) -> Layout:
    """The names of a variant, `original` or `diffusers`."""
    is_diffusers = kind == "diffusers"
    attention = DIFFUSERS_ATTENTION if is_diffusers else ORIGINAL_ATTENTION
    return Layout(
        name=f"{family.name}-{kind}",
        family=family.name,
        places=_PLACES[kind],
        layers=LAYERS[kind],
        config_class="AutoencoderKL" if is_diffusers else None,
        gain="weight",
        prepare=partial(join_attention, attention),
        implied=has_quant_layers,
        finish=partial(finish_attention, attention[0], is_diffusers),
        denied=_denial(family),
        statistics_config=statistics_config,
        arguments=ARGUMENTS if is_diffusers else (),
    )


KL_LAYOUTS = tuple(kl_layout(family, kind) for family in _VARIANTS for kind in ("original", "diffusers"))
