"""First weights of a light decoder: random ones, then a last layer that least squares fits to them.

Layers are drawn so that activations keep their size from layer to layer (He et al., arXiv 1502.01852); what a block
adds to its input starts small. The layer that doubles the frames starts with copies, so that a clip starts as a row of
images. The last layer can then be solved: the ridge solution for the original's frames from the random features.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import Head, Upsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.convolution import conv_at
from flashvaed_cli.decoders.modules.naf_blocks import CellHead, branches_of, haar_bands
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.modules.patches import patchify
from flashvaed_cli.decoders.modules.shuffle_blocks import cells_to_channels
from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.naf_blocks import CELL, PARTS
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.surgery.layer_fit import DenseFit, FitSettings, LayerError, rows_for
from flashvaed_cli.surgery.rows import gather_rows, sample_positions

Clip = Float[Tensor, "_B _C _T _H _W"]

_LATENT_LAYER = "post_quant"
_HEAD_SHARE = 0.1  # of the usual size: frames start near grey
_ENDS_OF_SUMMANDS: dict[str, Callable[[Any], list[Conv]]] = {
    "chain": lambda block: block.convolutions()[-1:],
    "resblock": lambda block: [block.conv2],
    "naf": lambda block: [block.depthwise, *(branch.contract for branch in branches_of(block))],
}
"""The layers whose output a block of a kind adds to its input."""


@torch.no_grad()
def random_light_decoder(
    spec: DecoderSpec, *, mean: tuple[float, ...] = (), std: tuple[float, ...] = (), seed: int = 0
) -> Decoder:
    """A light decoder with random weights, ready to train; the same for the same seed, whatever was drawn before.

    Args:
        spec: from `light_spec`.
        mean, std: of the raw latents; a 1x1 on the latents starts by normalizing them.
    """
    decoder = Decoder(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    num_adding = sum(block.kind in _ENDS_OF_SUMMANDS for _, block in spec.blocks())
    for address, block in decoder.blocks():
        for layer in _convolutions(block):
            _draw(layer, math.sqrt(2.0), generator)
        kind = decoder.spec_of(address).kind
        if stage_of(address) == _LATENT_LAYER:
            _normalize(conv_at(block, "conv"), mean, std)
        elif kind in _ENDS_OF_SUMMANDS:
            for layer in _ENDS_OF_SUMMANDS[kind](block):
                layer.weight.div_(math.sqrt(2.0 * num_adding))
        elif kind in _STARTS:
            _STARTS[kind](block)
    return decoder


def _convolutions(block: nn.Module) -> list[Conv]:
    return [layer for layer in block.modules() if isinstance(layer, Conv)]


def _double_by_copies(block: Upsample) -> None:
    if block.temporal is not None:
        eye = torch.eye(block.temporal.spec.in_width)
        block.temporal.weight.copy_(eye.repeat(2, 1).reshape(block.temporal.weight.shape))


def _dim(head: nn.Module) -> None:
    for layer in _convolutions(head):
        layer.weight.mul_(_HEAD_SHARE)


_STARTS: dict[str, Callable[[Any], None]] = {"upsample": _double_by_copies, "head": _dim, "cell_head": _dim}
"""Changes to the random weights of some kinds of blocks."""


def _draw(layer: Conv, gain: float, generator: torch.Generator) -> None:
    layer.weight.normal_(std=gain / math.sqrt(layer.weight[0].numel()), generator=generator)
    layer.bias.zero_()


def _normalize(layer: Conv, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make a 1x1 give (x - mean) / std, or without statistics its input."""
    width = layer.spec.in_width
    deviations = torch.tensor(std or (1.0,) * width)
    layer.weight.copy_(torch.diag(1 / deviations))
    layer.bias.copy_(-torch.tensor(mean or (0.0,) * width) / deviations)


@torch.no_grad()
def fit_last_layer(
    student: Decoder,
    teacher: Decoder,
    clips: Iterable[Float[Tensor, "_B C _T _Hz _Wz"]],
    *,
    num_clips: int,
    settings: FitSettings,
) -> LayerError:
    """Solve the head of a light decoder, in place, for the frames of the original.

    Args:
        clips: raw latents, one calibration clip at a time; consumed once.
        num_clips: their number.
    Returns:
        The share of the frames' variance that is missed, before and after; for cells, the mean over their layers.
    Raises:
        CalibrationError: no clips, NaN, or too few positions for the unknowns.
    """
    address, last_layers = next((at, _LAST_LAYERS[b.kind]) for at, b in student.spec.blocks() if b.kind in _LAST_LAYERS)
    head = student.at(address)
    if num_clips < 1:
        raise CalibrationError("no calibration clip was given; pass --data with at least one video")
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    fits: dict[Conv, DenseFit] = {}
    fast_student, fast_teacher = exact_decoder(student), exact_decoder(teacher)
    for latents in clips:
        latents = latents.to(device)
        entering = fast_student.run(latents, stop=address)
        frames = fast_teacher(latents).clamp(-1.0, 1.0)
        for layer, reads, target in last_layers(head, entering, frames, student.spec.patch):
            fit = fits.setdefault(layer, DenseFit([layer], settings=settings))
            b, _, t, h, w = target.shape
            at = sample_positions((b, t, h, w), rows_for([layer], num_clips), generator)
            fit.update([reads], gather_rows(target, at), at)
    errors = [fit.solve_() for fit in fits.values()]
    before, after = (statistics.fmean(getattr(one, name) for one in errors) for name in ("before", "after"))
    return replace(errors[0], before=before, after=after)


def _layer_of_head(head: Head, entering: Clip, frames: Clip, patch: int) -> Iterator[tuple[Conv, Clip, Clip]]:
    yield head.conv, head.before_conv(entering), patchify(frames, patch)


def _layers_of_cells(head: CellHead, entering: Clip, frames: Clip, _patch: int) -> Iterator[tuple[Conv, Clip, Clip]]:
    """The layers for the first frame, then those for the others; each gives some bands of the cells."""
    for medium, factor, at in (("image", (1, *CELL[1:]), slice(0, 1)), ("video", CELL, slice(1, None))):
        given = frames[:, :, at]
        if not given.shape[2]:
            continue
        bands = haar_bands(cells_to_channels(given, factor), factor)
        read = band = 0
        for part in PARTS:
            layer = conv_at(head, f"{medium}_{part}")
            width, num_bands = layer.spec.in_width, layer.spec.out_width
            yield layer, entering[:, read : read + width, at], bands[:, band : band + num_bands]
            read, band = read + width, band + num_bands


_LAST_LAYERS: dict[str, Callable[[Any, Clip, Clip, int], Iterator[tuple[Conv, Clip, Clip]]]] = {
    "head": _layer_of_head,
    "cell_head": _layers_of_cells,
}
"""For each kind of head, its layers that give frames, each with its inputs and its targets."""
