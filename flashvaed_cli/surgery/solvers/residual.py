"""Blocks with a shortcut: residual blocks, chains, attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Attention, Chain, ResBlock
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.surgery.attention_fit import set_collapsed
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import DenseFit, LayerError, LayerFit, LinearFit, can_be_joined
from flashvaed_cli.surgery.recording import BLOCK, RecordedRows
from flashvaed_cli.surgery.rows import dense_rows_per_clip, gather_rows
from flashvaed_cli.surgery.solvers.pair import Clip, Pair
from flashvaed_cli.surgery.solvers.steps import (
    fit_of,
    normed_rows,
    original_normed,
    rows_of_convolutions,
    same_rows,
    solve_entering_gain,
    solve_gain,
    solve_layer,
    targets,
)
from flashvaed_cli.surgery.transfer import pick


def rows_of_resblock(pair: Pair[ResBlock]) -> dict[str, int]:
    """Number of positions of a clip by layer."""
    return rows_of_convolutions(pair, _last_layers(pair, pair.student.conv2))


def rows_of_chain(pair: Pair[Chain]) -> dict[str, int]:
    """Number of positions of a clip by layer."""
    return rows_of_convolutions(pair, _last_layers(pair, pair.student.convolutions()[-1]))


def rows_of_attention(pair: Pair[Attention]) -> dict[str, int]:
    """Number of positions of a clip: as many as query, key and value want."""
    return same_rows(pair, (), dense_rows_per_clip(pair.student.qkv.in_features, pair.num_clips))


def _last_layers(pair: Pair[ResBlock | Chain], last: Conv) -> list[Conv]:
    """The last convolution of the main path, and the shortcut where the two are solved as one."""
    shortcut = pair.student.shortcut
    if shortcut is None or pair.settings.mode == "channel" or not can_be_joined(last):
        return [last]
    return [last, shortcut]


def _fit_of_shortcut(pair: Pair[ResBlock | Chain], width: int) -> LayerFit:
    """The fit of a shortcut in channel mode; an identity over `width` channels that became a 1x1 is the unit matrix."""
    if pair.reference.shortcut is not None:
        return fit_of(pair, "shortcut", pair.before, pair.after)
    layer = pair.student.shortcut
    assert layer is not None
    eye = torch.eye(width, device=layer.weight.device)
    kernel, bias = eye[:, :, None, None, None], eye.new_zeros(width)
    return ChannelFit(layer, kernel, bias, before=pair.before, after=pair.after, settings=pair.settings)


def solve_resblock(pair: Pair[ResBlock]) -> list[LayerError]:
    """Norms and convolutions in forward order; the last one for the block's output, jointly with the shortcut if both
    are dense, else for what the shortcut leaves of it."""
    old, new = pair.reference, pair.student

    def at_block(y: Clip, rows: RecordedRows) -> Tensor:
        return gather_rows(y, rows.positions[BLOCK])

    def inner(y: Clip) -> Clip:
        return new.conv1(F.silu(new.norm1(y)))

    def hidden(y: Clip) -> Clip:
        return F.silu(new.norm2(inner(y)))

    kept_inside = pair.inner["conv1"]
    solve_entering_gain("norm1", old.norm1, new.norm1, pair)
    errors = [
        solve_layer(
            fit_of(pair, "conv1", pair.before, kept_inside),
            pair,
            "conv1",
            lambda y: [F.silu(new.norm1(y))],
            lambda _, rows: targets(pair, rows, "conv1", kept_inside),
        )
    ]
    solve_gain(
        new.norm2,
        pair,
        inner,
        lambda rows: pick(original_normed(old.norm2, "norm2", rows, rows.outputs["conv1"]), kept_inside, 1),
    )
    if pair.settings.mode == "channel":
        second = fit_of(pair, "conv2", kept_inside, pair.after)
        errors.append(solve_layer(second, pair, "conv2", lambda y: [hidden(y)], lambda _, rows: rows.inputs["conv2"]))
        if new.shortcut is not None:
            errors.append(
                solve_layer(
                    _fit_of_shortcut(pair, old.conv1.spec.in_width),
                    pair,
                    BLOCK,
                    lambda y: [new.before_shortcut(y)],
                    lambda _, rows: old.before_shortcut(rows.inputs[BLOCK]),
                )
            )
        return errors
    if len(together := _last_layers(pair, new.conv2)) > 1:
        errors.append(
            solve_layer(
                DenseFit(together, settings=pair.settings),
                pair,
                BLOCK,
                lambda y: [hidden(y), new.before_shortcut(y)],
                lambda _, rows: pick(rows.outputs[BLOCK], pair.after, 1),
            )
        )
        return errors

    def beside_shortcut(y: Clip, rows: RecordedRows) -> Tensor:
        across = y if new.shortcut is None else new.shortcut(new.before_shortcut(y))
        return pick(rows.outputs[BLOCK], pair.after, 1) - at_block(across, rows)

    second = fit_of(pair, "conv2", kept_inside, pair.after)
    errors.append(solve_layer(second, pair, BLOCK, lambda y: [hidden(y)], beside_shortcut))
    return errors


def solve_chain(pair: Pair[Chain]) -> list[LayerError]:
    """Every layer for the original's output before the activation; the last one and the shortcut for their sum."""
    old, new = pair.reference, pair.student
    path, ends = new.spec.path, (pair.before, *pair.inner.values(), pair.after)

    def reads(y: Clip, depth: int) -> Clip:
        for conv in new.convolutions()[:depth]:
            y = F.relu(conv(y))
        return y

    errors = []
    for depth, name in enumerate(path[:-1]):
        before, after = ends[depth : depth + 2]
        errors.append(
            solve_layer(
                fit_of(pair, name, before, after),
                pair,
                name,
                lambda y, depth=depth: [reads(y, depth)],
                lambda _, rows, name=name, after=after: targets(pair, rows, name, after),
            )
        )
    last = path[-1]
    if pair.settings.mode == "channel":
        fit = fit_of(pair, last, ends[-2], pair.after)
        errors.append(solve_layer(fit, pair, last, lambda y: [reads(y, -1)], lambda _, rows: rows.inputs[last]))
        if new.spec.shortcut is not None:
            across = _fit_of_shortcut(pair, old.spec.in_width)
            errors.append(solve_layer(across, pair, BLOCK, lambda y: [y], lambda _, rows: rows.inputs[BLOCK]))
        return errors

    def whole(rows: RecordedRows) -> Tensor:
        across = rows.inputs[BLOCK] if old.shortcut is None else rows.outputs["shortcut"]
        return pick(rows.outputs[last] + across, pair.after, 1)

    if len(together := _last_layers(pair, new.convolutions()[-1])) > 1:
        joint = DenseFit(together, settings=pair.settings)
        errors.append(solve_layer(joint, pair, BLOCK, lambda y: [reads(y, -1), y], lambda _, rows: whole(rows)))
        return errors

    def beside_shortcut(y: Clip, rows: RecordedRows) -> Tensor:
        return whole(rows) - gather_rows(y if new.shortcut is None else new.shortcut(y), rows.positions[BLOCK])

    fit = fit_of(pair, last, ends[-2], pair.after)
    errors.append(solve_layer(fit, pair, BLOCK, lambda y: [reads(y, -1)], beside_shortcut))
    return errors


def solve_attention(pair: Pair[Attention]) -> list[LayerError]:
    """The norm, query, key and value in one, then the projection; in channel mode the norm alone."""
    old, new = pair.reference, pair.student

    def normed(y: Clip, rows: RecordedRows) -> Tensor:
        return normed_rows(new.norm, y, rows.positions[BLOCK])

    solve_entering_gain("norm", old.norm, new.norm, pair)
    if pair.settings.mode == "channel":
        return []
    is_narrower = new.proj.in_features != old.proj.in_features
    layer = new.qkv
    if is_narrower:  # fitted at the original's inner width, then collapsed
        layer = nn.Linear(new.qkv.in_features, old.qkv.out_features).to(new.qkv.weight.device).requires_grad_(False)
        layer.weight.copy_(pick(old.qkv.weight, pair.before, 1))
        layer.bias.copy_(old.qkv.bias)
    qkv = LinearFit(layer, f"{pair.address}.qkv", settings=pair.settings)
    for y, rows in pair.clips():
        qkv.update(normed(y, rows), old.qkv(original_normed(old.norm, "norm", rows, rows.inputs[BLOCK])))
    errors = [qkv.solve_()]
    if is_narrower:
        outer, bias = pick(old.proj.weight, pair.after, 0), pick(old.proj.bias, pair.after, 0)
        set_collapsed(new, layer.weight, layer.bias, outer, bias)
    proj = LinearFit(new.proj, f"{pair.address}.proj", settings=pair.settings)
    for y, rows in pair.clips():
        at = rows.positions[BLOCK]
        target = pick(rows.outputs[BLOCK], pair.after, 1) - gather_rows(y, at)
        proj.update(_mixed(new, y)[at.to(y.device)], target)
    return [*errors, proj.solve_()]


def _mixed(block: Attention, y: Clip) -> Float[Tensor, "P I"]:
    """The input of the output projection: one row per position `[B, T, H, W]`."""
    seen: list[Tensor] = []
    handle = block.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        block(y)
    finally:
        handle.remove()
    return seen[0].flatten(0, 1)  # [BT, HW, I] -> [P, I]
