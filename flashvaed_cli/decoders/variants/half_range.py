"""Scale decoders whose activations leave the range of float16 so that they stay within it, with the same frames.

A norm cancels a factor of its input. So the residual stream, which only norms and linear layers read, can be halved as
often as needed, and so can the tensor between the two convolutions of a residual block: powers of two change no digit
of any number. Only the eps of a norm has to follow.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import Attention, Chain, ConvBlock, Head, ResBlock, Upsample
from flashvaed_cli.decoders.modules.cell_blocks import CellUpsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.convolution import Conv
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, Norm
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample
from flashvaed_cli.decoders.spec.addresses import stage_of

LARGEST = 2.0**11
"""Largest magnitude in the probe that needs no scaling: a 32nd of float16's range."""
_WANTED = 2.0**8
_Scalable = ConvBlock | ResBlock | Chain | Attention | Upsample | ShuffleUpsample | CellUpsample | Head
_PROBE_GRID = (2, 6, 6)
_PROBE_SPREAD = 2.0  # of raw latents, about that of the families' statistics
_SEED = 0


def cast_decoder(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Cast a decoder in place; for float16, scale it first if its activations would leave the range.

    Decoders that are in half precision already are not scaled: their weights have lost the digits already.
    """
    if dtype == torch.float16 and next(decoder.parameters()).dtype in (torch.float32, torch.float64):
        fit_half_range(decoder)
    return decoder.to(dtype)


@torch.no_grad()
def fit_half_range(decoder: Decoder) -> dict[str, int]:
    """Scale a decoder in place if random latents show the need; returns the exponents of two by place.

    The place `stream` is the residual stream of all stages, an address such as `up2.0.conv1` the inside of that block.
    Decoders with scales for noise, or with blocks that cannot be scaled, are left as they are.
    """
    if any(getattr(block, "noise1", None) is not None for block in _blocks(decoder)):
        return {}
    if not all(isinstance(block, _Scalable) for block in _blocks(decoder)):
        return {}  # gates and thresholds, for example, do not scale with their input
    peaks, begin = _peaks(decoder), _stream_start(decoder)
    if begin is None:
        peaks.pop("stream", None)
    exponents = {place: round(math.log2(_WANTED / peak)) for place, peak in peaks.items() if LARGEST < peak < math.inf}
    for place, exponent in exponents.items():
        if place == "stream" and begin is not None:
            _scale_stream(decoder, 2.0**exponent, begin)
    for block in _blocks(decoder):
        if isinstance(block, ResBlock) and block.conv1.address in exponents:
            scale = 2.0 ** exponents[block.conv1.address]
            _multiply(block.conv1, scale)
            _follow(block.norm2, scale)
    return exponents


def _blocks(decoder: Decoder) -> Iterator[nn.Module]:
    for _, block in decoder.blocks():
        yield block


def _peaks(decoder: Decoder) -> dict[str, float]:
    """The largest magnitudes for random latents: in the stream, and after the first layer of every residual block."""
    peaks: dict[str, float] = defaultdict(float)
    hooks = []

    def watch(module: nn.Module, place: str) -> None:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.numel():
                peaks[place] = max(peaks[place], float(output.abs().max()))

        hooks.append(module.register_forward_hook(look))

    for block in _blocks(decoder):
        if isinstance(block, Head):
            continue
        watch(block, "stream")
        for part in block.modules():
            if isinstance(part, Conv):
                is_inner = isinstance(block, ResBlock) and part is block.conv1
                watch(part, part.address if is_inner else "stream")
    spec, parameter = decoder.spec, next(decoder.parameters())
    grid = (1 if spec.still else _PROBE_GRID[0], *_PROBE_GRID[1:])
    generator = torch.Generator().manual_seed(_SEED)
    latents = _PROBE_SPREAD * torch.randn(1, spec.latent_width, *grid, generator=generator)
    try:
        decoder(latents.to(parameter.device, parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return peaks


def _stream_start(decoder: Decoder) -> int | None:
    """The index of the block that begins the stream, the last convolution before the first other block.

    If a bypass leads copies past that convolution, the stream starts before its stage; None: nothing comes before it,
    so that the stream holds copies of the latents. A bypass that has a layer is scaled with the convolution.
    """
    addresses, blocks = zip(*decoder.blocks(), strict=True)
    copying = {stage for stage in decoder.bypasses if decoder.bypass_of(stage).conv is None}
    begin = next(i for i, block in enumerate(blocks) if not isinstance(block, ConvBlock)) - 1
    while begin > 0 and stage_of(addresses[begin]) in copying:
        begin -= 1
    return None if begin < 0 or stage_of(addresses[begin]) in copying else begin


def _scale_stream(decoder: Decoder, scale: float, begin: int) -> None:
    """Scale the stream from the block that begins it to the head."""
    blocks = list(decoder.blocks())[begin:]
    first = stage_of(blocks[0][0])
    for index, (_, block) in enumerate(blocks):
        _scale_block(block, scale, is_first=index == 0)
    for stage in dict.fromkeys(stage_of(address) for address, _ in blocks):
        if stage in decoder.bypasses and (conv := decoder.bypass_of(stage).conv) is not None:
            _multiply(conv, scale, bias_only=stage != first)


def _scale_block(block: nn.Module, scale: float, *, is_first: bool) -> None:
    if isinstance(block, ConvBlock):
        _multiply(block.conv, scale, bias_only=not is_first)
    elif isinstance(block, ResBlock):
        _follow(block.norm1, scale)
        _multiply(block.conv2, scale)
        if block.shortcut is not None:
            _multiply(block.shortcut, scale, bias_only=block.shortcut_norm is None)
        if block.shortcut_norm is not None:
            _follow(block.shortcut_norm, scale)
    elif isinstance(block, Attention):
        _follow(block.norm, scale)
        block.proj.weight.mul_(scale)
        block.proj.bias.mul_(scale)
    elif isinstance(block, Upsample):
        for conv in (block.temporal, block.spatial):
            if conv is not None:
                _multiply(conv, scale, bias_only=True)
    elif isinstance(block, Chain):  # ReLU keeps a positive factor
        for conv in (*block.convolutions(), *([] if block.shortcut is None else [block.shortcut])):
            _multiply(conv, scale, bias_only=True)
    elif isinstance(block, ShuffleUpsample):
        _multiply(block.conv, scale, bias_only=True)
    elif isinstance(block, CellUpsample):
        for conv in (block.conv, block.first):
            if conv is not None:
                _multiply(conv, scale, bias_only=True)
    elif isinstance(block, Head) and block.norm is not None:
        _follow(block.norm, scale)
    elif isinstance(block, Head):  # the factor of the stream is cancelled here
        block.conv.weight.div_(scale)


def _multiply(conv: Conv, scale: float, *, bias_only: bool = False) -> None:
    conv.bias.mul_(scale)
    if not bias_only:
        conv.weight.mul_(scale)


def _follow(norm: Norm | ChannelLayerNorm, scale: float) -> None:
    """Adapt a norm to its scaled input, so that its output stays the same."""
    if norm.eps is not None:
        norm.eps *= scale**2
