"""First weights of a light decoder: random ones, and a last layer that makes the best of these by least squares.

Layers are drawn so that activations keep their size on the way (He et al., arXiv 1502.01852); what a block adds to its
input begins small. The layer that doubles the frames begins with copies, so that a clip begins as a row of images. The
last layer can then be solved: the ridge solution for the original's frames from what the random layers give it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import Chain, Head, ResBlock, Upsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.naf_blocks import CellHead, Naf, haar_bands
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

_LATENT_LAYER = "post_quant"
_HEAD_SHARE = 0.1  # of the usual size: frames begin near grey


@torch.no_grad()
def random_light_decoder(
    spec: DecoderSpec, *, mean: tuple[float, ...] = (), std: tuple[float, ...] = (), seed: int = 0
) -> Decoder:
    """A light decoder with random weights, ready to train: the same for the same seed, whatever was drawn before.

    Args:
        spec: from `light_spec`.
        mean, std: of the raw latents; a 1x1 on the latents begins by normalizing them.
    """
    decoder = Decoder(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    num_adding = sum(isinstance(block, Chain | ResBlock | Naf) for _, block in decoder.blocks())
    for address, block in decoder.blocks():
        for layer in block.modules():
            if isinstance(layer, Conv):
                _draw(layer, math.sqrt(2.0), generator)
        if stage_of(address) == _LATENT_LAYER:
            _normalize(block.get_submodule("conv"), mean, std)
        elif isinstance(block, Chain):
            block.convolutions()[-1].weight.div_(math.sqrt(2.0 * num_adding))
        elif isinstance(block, ResBlock):
            block.conv2.weight.div_(math.sqrt(2.0 * num_adding))
        elif isinstance(block, Upsample) and block.temporal is not None:
            width = block.temporal.spec.in_width
            block.temporal.weight.copy_(torch.eye(width).repeat(2, 1).reshape(block.temporal.weight.shape))
        elif isinstance(block, Naf):
            for layer in (block.depthwise, *(branch.get_submodule("contract") for branch in block.branches)):
                assert isinstance(layer, Conv)
                layer.weight.div_(math.sqrt(2.0 * num_adding))
        elif isinstance(block, Head):
            block.conv.weight.mul_(_HEAD_SHARE)
        elif isinstance(block, CellHead):
            for name in block.spec.layers:
                block.get_submodule(name).get_parameter("weight").mul_(_HEAD_SHARE)
    return decoder


def _draw(layer: Conv, gain: float, generator: torch.Generator) -> None:
    layer.weight.normal_(std=gain / math.sqrt(layer.weight[0].numel()), generator=generator)
    layer.bias.zero_()


def _normalize(layer: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make a 1x1 give (x - mean) / std; without statistics, what it reads."""
    assert isinstance(layer, Conv)
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
        num_clips: of them.
    Returns:
        The share of the frames' variance that is missed, before and after; of cells, that of their bands, on average.
    Raises:
        CalibrationError: no clips, NaN, or too few positions for the unknowns.
    """
    address = next(address for address, block in student.blocks() if isinstance(block, Head | CellHead))
    head = student.at(address)
    assert isinstance(head, Head | CellHead)
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
        for layer, reads, target in _last_layers(head, entering, frames, student.spec.patch):
            fit = fits.setdefault(layer, DenseFit([layer], settings=settings))
            b, _, t, h, w = target.shape
            at = sample_positions((b, t, h, w), rows_for([layer], num_clips), generator)
            fit.update([reads], gather_rows(target, at), at)
    errors = [fit.solve_() for fit in fits.values()]
    before, after = (statistics.fmean(getattr(one, name) for one in errors) for name in ("before", "after"))
    return replace(errors[0], before=before, after=after)


def _last_layers(
    head: Head | CellHead, entering: Tensor, frames: Tensor, patch: int
) -> Iterator[tuple[Conv, Tensor, Tensor]]:
    """Every layer that gives frames, what it reads, and what it should give: frames in patches, or bands of cells."""
    if isinstance(head, Head):
        yield head.conv, head.before_conv(entering), patchify(frames, patch)
        return
    for medium, factor, at in (("image", (1, *CELL[1:]), slice(0, 1)), ("video", CELL, slice(1, None))):
        given = frames[:, :, at]
        if not given.shape[2]:
            continue
        bands = haar_bands(cells_to_channels(given, factor), factor)
        read = band = 0
        for part in PARTS:
            layer = head.get_submodule(f"{medium}_{part}")
            assert isinstance(layer, Conv)
            width, num_bands = layer.spec.in_width, layer.spec.out_width
            yield layer, entering[:, read : read + width, at], bands[:, band : band + num_bands]
            read, band = read + width, band + num_bands
