"""LTX's conditioning on a timestep, as a gain and a shift of every norm, and back.

Reference: the names of those tensors in LTX's files (facts only).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CONDITION = re.compile(r"time_embedder|scale_shift_table|timestep_scale_multiplier")
"""Names of the tensors that norms are conditioned on."""

_EMBEDDING_WIDTH = 256
_LONGEST_PERIOD = 10000.0
_EMBEDDER = ".time_embedder.timestep_embedder.linear_1.weight"
_LAST_EMBEDDER = ".last_time_embedder.timestep_embedder.linear_1.weight"
_TABLE = "scale_shift_table"
_MULTIPLIER = "decoder.timestep_scale_multiplier"
_MULTIPLIED_BY = 1000.0


def fold_timestep(tensors: Mapping[str, Tensor], timestep: float) -> dict[str, Tensor]:
    """Turn the conditioning on a timestep into a gain and a shift of every norm: exact for this timestep.

    A stage's embedding of the timestep plus a block's table gives shift, scale, shift, scale of its two norms; the
    gain is 1 + scale. Tensors that lack a partner are left for the strict check to report.

    Raises:
        ValueError: a block without the table that its stage's embedding needs, or an embedder of other shapes.
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
        embedding = _embedded(embedder, at, *(part.double() for part in parts if part is not None))
        last = f"last_{_TABLE}" if suffix == _LAST_EMBEDDER else _TABLE
        if place == "decoder":
            _fold_table(folded, f"{place}.{last}", embedding, [f"{place}.norm_out"])
            continue
        inside = re.compile(re.escape(place) + r"\.(?:res_blocks|resnets)\.\d+(?=\.)")
        for block in dict.fromkeys(match[0] for name in tensors if (match := inside.match(name))):
            _fold_table(folded, f"{block}.{_TABLE}", embedding, [f"{block}.norm1", f"{block}.norm2"])
    return folded


def _fold_table(folded: dict[str, Tensor], name: str, embedding: Float[Tensor, " D"], norms: list[str]) -> None:
    table = folded.get(name)
    if table is None:
        raise ValueError(f"no tensor named {name}, which the embedding of the timestep is added to")
    if table.numel() != embedding.numel():
        return
    del folded[name]
    rows = embedding.view(table.shape) + table.double()  # [2 per norm, C]
    for norm, (shift, scale) in zip(norms, rows.split(2), strict=True):
        folded[f"{norm}.weight"] = (1 + scale).float()
        folded[f"{norm}.bias"] = shift.float()


def unfold_timestep(tensors: Mapping[str, Tensor], *, style: str) -> dict[str, Tensor]:
    """The reverse: gains and shifts as the blocks' tables, with embedders of zeros, so the same for every timestep.

    If the norms of a stage differ in width, as in pruned decoders, all stay gains and shifts: a stage has one
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
    """Replace a block's norms by its table; returns a shift."""
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


def _embedded(
    place: str, at: float, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Float[Tensor, " D"]:
    """The embedding: cosines and sines of the timestep, through two layers."""
    for number, weight, bias in ((1, weight1, bias1), (2, weight2, bias2)):
        width = _EMBEDDING_WIDTH if number == 1 else weight1.shape[0]
        if weight.dim() != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            found = f"{list(weight.shape)} and {list(bias.shape)}"
            raise ValueError(f"{place}.linear_{number} has the shapes {found}; expected [N, {width}] and [N]")
    half = _EMBEDDING_WIDTH // 2
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    waves = torch.cat([(at * frequencies).cos(), (at * frequencies).sin()])
    return F.linear(F.silu(F.linear(waves, weight1, bias1)), weight2, bias2)
