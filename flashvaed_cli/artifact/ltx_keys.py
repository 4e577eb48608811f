"""Where the blocks of LTX-Video live in foreign checkpoints, as data, and what must be made of their tensors first.

`ltx-VERSION-original`: LTX's single files (`vae.` before every name, beside the diffusion model's) and the released
`Flash_VAED_LTX.pth`. `ltx-VERSION-diffusers`: `AutoencoderKLLTXVideo`.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.artifact.layouts import Layout
from flashvaed_cli.decoders.family import Family
from flashvaed_cli.decoders.ltx import DECODE_TIMESTEP, LTX_090, LTX_091, LTX_095, LTX_2
from flashvaed_cli.decoders.ltx_config import SEPARABLE_CAUSAL
from flashvaed_cli.decoders.spec.coders import CoderSpec

MEAN_NAMES = ("per_channel_statistics.mean-of-means", "latents_mean", "mean_of_means")
STD_NAMES = ("per_channel_statistics.std-of-means", "latents_std", "std_of_means")
CONFIG_CLASSES = {LTX_2.name: "AutoencoderKLLTX2Video"}  # the others: AutoencoderKLLTXVideo

_EMBEDDING_WIDTH = 256
_LONGEST_PERIOD = 10000.0

_LAYERS = {
    "conv": {"conv": "conv"},
    "resblock": {
        "norm1": "norm1",
        "conv1": "conv1.conv",
        "norm2": "norm2",
        "conv2": "conv2.conv",
        "noise1": "per_channel_scale1",
        "noise2": "per_channel_scale2",
    },
    "shuffle_upsample": {"conv": "conv.conv"},
    "strided_downsample": {"conv": "conv"},
    "unshuffle_downsample": {"conv": "conv.conv"},
    "head": {"norm": "norm_out", "conv": "conv_out.conv"},
}
_SHORTCUTS = {
    "original": {"shortcut_norm": "norm3.norm", "shortcut": "conv_shortcut"},
    "diffusers": {"shortcut_norm": "norm3", "shortcut": "conv_shortcut.conv"},
}


def _layers(style: str) -> dict[str, dict[str, str]]:
    return {**_LAYERS, "resblock": {**_LAYERS["resblock"], **_SHORTCUTS[style]}}


def _ends(role: str) -> dict[str, str]:
    return {"conv_in.0": f"{role}.conv_in", "head.0": role}


def _original_places(spec: CoderSpec) -> dict[str, str]:
    """One flat list: a run of blocks that keep the width is an entry, and so is every block that does not."""
    side = "up" if spec.role == "decoder" else "down"
    places, entry = _ends(spec.role), 0
    for stage in spec.stages[1:-1]:
        run = -1  # blocks so far in the entry; -1: none is open
        for index, block in enumerate(stage.blocks):
            keeps = block.kind == "resblock" and block.shortcut is None
            if not keeps and run >= 0:
                entry, run = entry + 1, -1
            place = f"{spec.role}.{side}_blocks.{entry}"
            if keeps:
                run += 1
                places[f"{stage.name}.{index}"] = f"{place}.res_blocks.{run}"
            else:
                places[f"{stage.name}.{index}"] = place
                entry += 1
        entry += run >= 0
    return places


def _diffusers_places(spec: CoderSpec) -> dict[str, str]:
    """Blocks of a stage by what they do; the block that changes the width leads a stage going up, and ends one down."""
    side, changer, sampler = (
        ("up", "conv_in", "upsamplers") if spec.role == "decoder" else ("down", "conv_out", "downsamplers")
    )
    places = _ends(spec.role)
    for stage in spec.stages[1:-1]:
        number = re.sub(r"\D", "", stage.name)
        place = f"{spec.role}.{side}_blocks.{number}" if number else f"{spec.role}.mid_block"
        run = 0
        for index, block in enumerate(stage.blocks):
            if block.kind != "resblock":
                name = f"{sampler}.0"
            elif block.shortcut is not None:
                name = changer
            else:
                name, run = f"resnets.{run}", run + 1
            places[f"{stage.name}.{index}"] = f"{place}.{name}"
    return places


def prepare(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, style: str) -> dict[str, Tensor]:
    """The tensors of blocks alone, under the names of the layout: no statistics, no embedding of the timestep."""
    blocks = {name: tensor for name, tensor in tensors.items() if not _is_statistic(name)}
    timestep = config.get("decode_timestep")
    return fold_timestep(_with_inner_names(blocks, style), DECODE_TIMESTEP if timestep is None else float(timestep))


def _is_statistic(name: str) -> bool:
    return name.startswith("per_channel_statistics.") or name in (*MEAN_NAMES, *STD_NAMES)


_INNER = re.compile(r"\.(conv1|conv2|conv_in|conv_out|conv)\.(?=(depthwise_conv|pointwise_conv|weight|bias))")
# The authors' LTX student; elsewhere the same parts end in `_conv`.
_RELEASED_PARTS = re.compile(r"\.(depthwise|pointwise)\.(?=weight$|bias$)")


def _with_inner_names(tensors: Mapping[str, Tensor], style: str) -> dict[str, Tensor]:
    """Students that put another layer in the place of LTX's causal one lack its inner `conv`: it is put in.

    Reference: the names in the released students' code; no such LTX file was at hand.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = _RELEASED_PARTS.sub(r".\1_conv.", name)
        inner = _INNER.search(name)
        if inner is not None and ".conv." not in name:
            name = f"{name[: inner.end()]}conv.{name[inner.end() :]}"
        if ".conv_shortcut." in name:
            name = name.replace(".conv_shortcut.conv.", ".conv_shortcut.")
            name = name.replace(".conv_shortcut.", f".{_SHORTCUTS[style]['shortcut']}.")
        renamed[name] = tensor
    return renamed


def implied(names: Iterable[str]) -> dict[str, Any]:
    """What the released student's names say: its depthwise layers pad causally, its dense ones are centred."""
    return {SEPARABLE_CAUSAL: True} if any(_RELEASED_PARTS.search(name) for name in names) else {}


_EMBEDDER = ".time_embedder.timestep_embedder.linear_1.weight"
_LAST_EMBEDDER = ".last_time_embedder.timestep_embedder.linear_1.weight"
_TABLE = "scale_shift_table"
_MULTIPLIER = "decoder.timestep_scale_multiplier"
_MULTIPLIED_BY = 1000.0


def fold_timestep(tensors: Mapping[str, Tensor], timestep: float) -> dict[str, Tensor]:
    """Turn the condition on the timestep into a gain and a shift of every norm: exact for this one timestep.

    A stage's embedding of the timestep plus a block's table gives shift, scale, shift, scale of its two norms; the
    gain is 1 + scale. Tensors that lack a partner are left for the strict check to name.
    """
    folded = dict(tensors)
    scale = folded.pop(_MULTIPLIER, None)
    if scale is None:
        return folded
    at = timestep * float(scale)
    for name in [name for name in tensors if name.endswith((_EMBEDDER, _LAST_EMBEDDER))]:
        suffix = _LAST_EMBEDDER if name.endswith(_LAST_EMBEDDER) else _EMBEDDER
        place, embedder = name.removesuffix(suffix), name.removesuffix(".linear_1.weight")
        parts = [folded.pop(f"{embedder}.linear_{i}.{end}", None) for i in (1, 2) for end in ("weight", "bias")]
        if any(part is None for part in parts):
            continue
        embedding = _embedded(at, *(part.double() for part in parts if part is not None))
        last = f"last_{_TABLE}" if suffix == _LAST_EMBEDDER else _TABLE
        if place == "decoder":
            _fold_table(folded, f"{place}.{last}", embedding, [f"{place}.norm_out"])
            continue
        inside = re.compile(re.escape(place) + rf"\.(res_blocks|resnets)\.\d+\.{_TABLE}")
        for table in [name for name in folded if inside.fullmatch(name)]:
            block = table.removesuffix(f".{_TABLE}")
            _fold_table(folded, table, embedding, [f"{block}.norm1", f"{block}.norm2"])
    return folded


def _fold_table(folded: dict[str, Tensor], name: str, embedding: Float[Tensor, " D"], norms: list[str]) -> None:
    table = folded.get(name)
    if table is None or table.numel() != embedding.numel():
        return
    del folded[name]
    rows = embedding.view(table.shape) + table.double()  # [2 per norm, C]
    for norm, (shift, scale) in zip(norms, rows.split(2), strict=True):
        folded[f"{norm}.weight"] = (1 + scale).float()
        folded[f"{norm}.bias"] = shift.float()


def unfold_timestep(tensors: Mapping[str, Tensor], *, style: str) -> dict[str, Tensor]:
    """The way back: gains and shifts as the blocks' tables, beside embedders of zeros, so for every timestep alike.

    Where the norms of a stage differ in width, as in pruned decoders, all stay gains and shifts: a stage has one
    embedding.
    """
    stages: dict[str, list[str]] = {}
    for name in tensors:
        if name.startswith("decoder.") and name.endswith(".norm1.bias"):
            block = name.removesuffix(".norm1.bias")
            stages.setdefault(block.rsplit(".", 2)[0], []).append(block)
    unfolded = dict(tensors)
    widths = {s: {tensors[f"{b}.norm{i}.bias"].numel() for b in blocks for i in (1, 2)} for s, blocks in stages.items()}
    if not stages or any(len(found) > 1 for found in widths.values()):
        return unfolded
    for stage, blocks in stages.items():
        for block in blocks:
            shift = _unfold_table(unfolded, f"{block}.{_TABLE}", [f"{block}.norm1", f"{block}.norm2"])
        unfolded |= _zero_embedder(f"{stage}{_EMBEDDER}", 4 * shift.numel(), shift)
    last, suffix = (f"last_{_TABLE}", _LAST_EMBEDDER) if style == "original" else (_TABLE, _EMBEDDER)
    shift = _unfold_table(unfolded, f"decoder.{last}", ["decoder.norm_out"])
    unfolded |= _zero_embedder(f"decoder{suffix}", 2 * shift.numel(), shift)
    return {**unfolded, _MULTIPLIER: shift.new_tensor(_MULTIPLIED_BY)}


def _unfold_table(unfolded: dict[str, Tensor], name: str, norms: list[str]) -> Float[Tensor, " C"]:
    """Puts the table of a block in the place of its norms; returns a shift."""
    rows: list[Tensor] = []
    for norm in norms:
        gain, shift = unfolded.pop(f"{norm}.weight"), unfolded.pop(f"{norm}.bias")
        rows += [shift, (gain.double() - 1).to(gain.dtype)]
    unfolded[name] = torch.stack(rows)  # [2 per norm, C]
    return rows[0]


def _zero_embedder(first: str, width: int, like: Tensor) -> dict[str, Tensor]:
    place, zeros = first.removesuffix(".linear_1.weight"), like.new_zeros
    return {
        f"{place}.linear_1.weight": zeros(width, _EMBEDDING_WIDTH),
        f"{place}.linear_1.bias": zeros(width),
        f"{place}.linear_2.weight": zeros(width, width),
        f"{place}.linear_2.bias": zeros(width),
    }


def _embedded(at: float, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Float[Tensor, " D"]:
    """Cosines and sines of the timestep, through two layers."""
    half = _EMBEDDING_WIDTH // 2
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    waves = torch.cat([(at * frequencies).cos(), (at * frequencies).sin()])
    return F.linear(F.silu(F.linear(waves, weight1, bias1)), weight2, bias2)


def _layout(family: Family, style: str) -> Layout:
    decoder = family.decoder_spec(8, family.latent_width)
    place = _original_places if style == "original" else _diffusers_places
    return Layout(
        name=f"{family.name.replace('-video', '')}-{style}",
        family=family.name,
        places={
            "decoder": place(decoder),
            "encoder": place(family.encoder_spec(8, family.latent_width)),
        },
        layers=_layers(style),
        config_class=CONFIG_CLASSES.get(family.name, "AutoencoderKLLTXVideo") if style == "diffusers" else None,
        gain="weight",
        by_blocks=True,
        is_shifted=decoder.decode_timestep is not None,
        prepare=partial(prepare, style=style),
        implied=implied,
        finish=partial(unfold_timestep, style=style),
        statistics=(MEAN_NAMES[0], STD_NAMES[0]) if style == "original" else (MEAN_NAMES[1], STD_NAMES[1]),
        prefix="vae." if style == "original" else "",
    )


LTX_ORIGINALS = tuple(_layout(family, "original") for family in (LTX_090, LTX_091, LTX_095, LTX_2))
LTX_DIFFUSERS = tuple(_layout(family, "diffusers") for family in (LTX_090, LTX_091, LTX_095, LTX_2))
