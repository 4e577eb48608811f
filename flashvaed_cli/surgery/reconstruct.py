"""Closed-form reconstruction: solve each layer of a changed decoder against the original, in forward order.

Two decoders run side by side on the same clips. Inputs are what the *new* decoder really feeds a layer, so
each solve also makes up for the errors of the layers before it; targets are what the *original* computes
there, on the kept channels. Nothing is trained.

Reference: arXiv 2602.19161 trains these layers; this is a departure (METHOD, "closed-form reconstruction").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.blocks import Attention, Head, ResBlock, Upsample
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.groups import Kept
from flashvaed_cli.decoders.operators import ChannelRMSNorm, Conv, SeparableConv3d, batch_as_frames, frames_as_batch
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.progress import Progress
from flashvaed_cli.surgery.activations import ActivationPairs
from flashvaed_cli.surgery.layer_fit import FitSettings, GainFit, LayerError, LayerFit
from flashvaed_cli.surgery.respec import input_tensors
from flashvaed_cli.surgery.transfer import Channels, channel_index, doubled, pick

Clip = Float[Tensor, "_B _C _T _H _W"]


@dataclass(frozen=True)
class _BlockPair:
    """A block of the original and its successor, with the channels that are left before, inside and behind it."""

    reference: nn.Module
    student: nn.Module
    before: Channels
    inner: Channels
    after: Channels
    settings: FitSettings


def first_changed_block(before: Decoder, after: Decoder) -> str | None:
    """Address of the first block whose spec differs; None when none does."""
    for (address, old), (_, new) in zip(before.spec.blocks(), after.spec.blocks(), strict=True):
        if old != new:
            return address
    return None


@torch.no_grad()
def reconstruct_decoder(
    reference: Decoder,
    student: Decoder,
    kept: Kept,
    clips: Iterable[Float[Tensor, "_B C _T _Hz _Wz"]],
    *,
    first_block: str,
    settings: FitSettings,
    progress: Progress,
) -> list[LayerError]:
    """Solve every layer of `student` from `first_block` on, in place.

    Args:
        reference: the original; its activations are the targets.
        kept: channels that are left, as indices of the reference's.
        clips: raw latents, one calibration clip at a time; consumed once.
        first_block: address of the first block to solve; those before it are only run.
    Returns:
        One line per solved layer: relative error before and after.
    Raises:
        CalibrationError: no clips, NaN, or too few positions for the unknowns.
    """
    inputs = input_tensors(student.spec)
    addresses = [address for address, _ in student.blocks()]
    start = addresses.index(first_block)
    device = next(student.parameters()).device
    errors: list[LayerError] = []
    with ActivationPairs(str(device)) as pairs:
        prefix = [(reference.at(a), student.at(a)) for a in addresses[:start]]
        pairs.fill(_run_prefix(prefix, latents.to(device)) for latents in clips)
        if len(pairs) == 0:
            raise CalibrationError("no calibration clip was given; pass --data with at least one video")
        with progress.task("reconstruction", len(addresses) - start) as task:
            for address in addresses[start:]:
                pair = _BlockPair(
                    reference.at(address),
                    student.at(address),
                    channel_index(kept, inputs[address]),
                    channel_index(kept, f"{address}.conv1"),
                    channel_index(kept, address),
                    settings,
                )
                errors += _SOLVERS[student.spec_of(address).kind](pair, pairs)
                if address != addresses[-1]:
                    pairs.advance(pair.reference, pair.student)
                task.advance(block=address)
    return errors


def _run_prefix(prefix: list[tuple[nn.Module, nn.Module]], latents: Clip) -> tuple[Clip, Clip]:
    reference, student = latents, latents.clone()  # what shares memory cannot be stored as two
    for reference_block, student_block in prefix:
        reference, student = reference_block(reference), student_block(student)
    return reference, student


def _solve_norm(norm: ChannelRMSNorm, pairs: ActivationPairs, both: Callable[[Clip, Clip], tuple[Clip, Clip]]) -> None:
    """Fit gamma; `both` maps a pair to (the new norm's input, the original norm's output on the kept channels)."""
    fit = GainFit(norm)
    for reference, student in pairs:
        fit.update(*both(reference, student))
    fit.solve_()


def _solve_layers(
    layers: list[Conv],
    pairs: ActivationPairs,
    settings: FitSettings,
    rows: Callable[[Clip, Clip], tuple[list[Clip], Clip]],
) -> LayerError:
    """Fit layers whose outputs are added; `rows` maps a pair to (their inputs, the target)."""
    fit = LayerFit(layers, num_clips=len(pairs), settings=settings)
    for reference, student in pairs:
        inputs, target = rows(reference, student)
        if target.shape[2] > 0:
            fit.update(inputs, target)
    return fit.solve_()


def _solve_resblock(pair: _BlockPair, pairs: ActivationPairs) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, ResBlock) and isinstance(new, ResBlock)

    def old_inner(x: Clip) -> Clip:
        return old.conv1(F.silu(old.norm1(x)))

    def new_inner(x: Clip) -> Clip:
        return new.conv1(F.silu(new.norm1(x)))

    def second_rows(x: Clip, y: Clip) -> tuple[list[Clip], Clip]:
        target = pick(old(x), pair.after, 1)
        hidden = F.silu(new.norm2(new_inner(y)))
        if len(joint) == 2:
            return [hidden, y], target
        return [hidden], target - (y if new.shortcut is None else new.shortcut(y))

    _solve_norm(new.norm1, pairs, lambda x, y: (y, pick(old.norm1(x), pair.before, 1)))
    first = _solve_layers(
        [new.conv1],
        pairs,
        pair.settings,
        lambda x, y: ([F.silu(new.norm1(y))], pick(old_inner(x), pair.inner, 1)),
    )
    _solve_norm(new.norm2, pairs, lambda x, y: (new_inner(y), pick(old.norm2(old_inner(x)), pair.inner, 1)))
    joint = [new.conv2]
    if new.shortcut is not None and not isinstance(new.conv2, SeparableConv3d):
        joint.append(new.shortcut)
    return [first, _solve_layers(joint, pairs, pair.settings, second_rows)]


def _solve_attention(pair: _BlockPair, pairs: ActivationPairs) -> list[LayerError]:
    """Only the norm follows; the projections keep their (cut) weights: they are few and stay dense."""
    old, new = pair.reference, pair.student
    assert isinstance(old, Attention) and isinstance(new, Attention)
    _solve_norm(new.norm, pairs, lambda x, y: (y, pick(old.norm(x), pair.before, 1)))
    return []


def _solve_upsample(pair: _BlockPair, pairs: ActivationPairs) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, Upsample) and isinstance(new, Upsample)
    errors = []
    if new.temporal is not None and any(y.shape[2] > 1 for _, y in pairs):
        old_temporal, new_temporal = old.temporal, new.temporal
        assert old_temporal is not None
        both_halves = doubled(pair.before, old_temporal)
        errors.append(
            _solve_layers(
                [new_temporal],
                pairs,
                pair.settings,
                lambda x, y: ([y[:, :, 1:]], pick(old_temporal(x[:, :, 1:]), both_halves, 1)),
            )
        )

    def spatial_rows(x: Clip, y: Clip) -> tuple[list[Clip], Clip]:
        y = y if new.temporal is None else new.double_frames(y)
        y = batch_as_frames(F.interpolate(frames_as_batch(y), scale_factor=2, mode="nearest"), y.shape[0])
        return [y], pick(old(x), pair.after, 1)

    errors.append(_solve_layers([new.spatial], pairs, pair.settings, spatial_rows))
    return errors


def _solve_head(pair: _BlockPair, pairs: ActivationPairs) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, Head) and isinstance(new, Head)
    _solve_norm(new.norm, pairs, lambda x, y: (y, pick(old.norm(x), pair.before, 1)))
    return [_solve_layers([new.conv], pairs, pair.settings, lambda x, y: ([F.silu(new.norm(y))], old(x)))]


def _solve_conv(pair: _BlockPair, pairs: ActivationPairs) -> list[LayerError]:
    layer = pair.student.conv
    assert isinstance(layer, Conv)
    return [_solve_layers([layer], pairs, pair.settings, lambda x, y: ([y], pick(pair.reference(x), pair.after, 1)))]


_SOLVERS: dict[str, Callable[[_BlockPair, ActivationPairs], list[LayerError]]] = {
    "resblock": _solve_resblock,
    "attention": _solve_attention,
    "upsample": _solve_upsample,
    "head": _solve_head,
    "conv": _solve_conv,
}
