"""A decoder as graphs that others run: their inputs and outputs, and the names of their caches.

A cache is named after its layer's address with underscores for dots: layer `up0.1.conv1` reads
`past_up0_1_conv1` and writes `future_up0_1_conv1`. Batch, latent frames, height and width can be anything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Attention, Upsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.naf_blocks import Branch
from flashvaed_cli.decoders.modules.norms import ChannelRMSNorm
from flashvaed_cli.decoders.modules.operators import Future, LowRankConv3d, Past, extend_with_past, pointwise_conv
from flashvaed_cli.decoders.spec.addresses import split_block
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.variants.half_range import cast_decoder

TRACE_BATCH = 2  # an axis of length one is taken for a constant
TRACE_GRID = (3, 5, 6)  # latent frames, height, width: all different, so that no two axes are taken for the same one


def trace_grid(spec: DecoderSpec) -> tuple[int, int, int]:
    """Latent frames, height and width to trace a decoder with."""
    return (1, *TRACE_GRID[1:]) if spec.still else TRACE_GRID


def check_grid(spec: DecoderSpec, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """A grid to compare a graph on: of no more latents than the decoder takes as one clip."""
    most = 1 if spec.still else grid[0] if spec.temporal_tiles is None else spec.temporal_tiles.length
    return min(grid[0], most), grid[1], grid[2]


def clip_notes(spec: DecoderSpec) -> tuple[str, ...]:
    """What to know of graphs of a decoder that sees whole clips: they take what they are given as one clip."""
    tiles = spec.temporal_tiles
    if tiles is None:
        return ()
    shared = f", of which neighbours share {tiles.overlap} and are blended" if tiles.overlap else ""
    return (
        f"the graph takes all latents as one clip; the decoder itself takes {tiles.length} at a time, each time a clip "
        f"of its own{shared}: cut longer ones so, or the frames are others",
    )


MAX_SIZE = 2**31 - 1
"""Of batches and frames; without a bound, older torch guards against 2^63 - 1, and rejects its own guard."""


class _AnyLengthUpsample(Upsample):
    """The same frames without a branch on the number of latents, so that one graph handles 1 and more."""

    def double_frames(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B C Td H W"]:
        if past is not None or self.grows_first:
            return super().double_frames(x, past, future)
        first = x[:, :, :1]
        later = (torch.arange(x.shape[2], device=x.device) > 0).to(x.dtype)
        unseen = x * later.view(1, 1, -1, 1, 1)  # zeros precede a clip too
        assert self.temporal is not None
        doubled = self.temporal(unseen, None, future).chunk(2, dim=1)
        rest = torch.stack(doubled, dim=3).flatten(2, 3)[:, :, 2:]  # [B, C, 2 (T - 1), H, W]
        return torch.cat([first, rest], dim=2)


class _AnyLengthAttention(Attention):
    """The same frames by a mask over all positions of the clip: a graph cannot go through frames one by one.

    The mask, and where no fused kernel takes it the products too, grow with the square of all positions.
    """

    def _over_clip(
        self,
        q: Float[Tensor, "B Q I"],
        k: Float[Tensor, "B K I"],
        v: Float[Tensor, "B K I"],
        x: Float[Tensor, "B C T H W"],
    ) -> Float[Tensor, "B Q I"]:
        frames = torch.arange(q.shape[1], device=q.device) // (x.shape[3] * x.shape[4])
        seen = frames[:, None] >= frames[None]
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=seen)[:, 0]


class _AnyLengthLowRank(LowRankConv3d):
    """The same frames from a window of past and present ones: the sum over taps branches on how many there are."""

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        window = extend_with_past(x, self.spec.kernel[0] - 1, self.address, past, future)
        return pointwise_conv(F.conv3d(window, self.reduce), self.weight, self.bias)


class _KeptEpsNorm(ChannelRMSNorm):
    """The same norm with the sum in multiples of its eps.

    torch's ONNX optimiser treats a summand of 1e-8 as zero and drops it: a zero vector then becomes NaN, and a
    short one too long.
    """

    def _unit(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        eps = self.eps
        assert eps is not None
        return x * (torch.rsqrt(x.square().mean(1, keepdim=True) / eps + 1) * eps**-0.5)


class _RowBranch(Branch):
    """The same on rows of channels, one for each position: no reshape around every layer.

    The sizes of a graph are symbols, whose products make reshapes what tracing a deep decoder spends most time on.
    """

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        norm = self.norm
        rows = F.layer_norm(x.movedim(1, -1), norm.gamma.shape, norm.gamma, norm.beta, norm.eps)
        values, gates = F.linear(rows, self.expand.weight, self.expand.bias).chunk(2, dim=-1)
        return F.linear(values * F.gelu(gates), self.contract.weight, self.contract.bias).movedim(-1, 1)


class ClipGraph(nn.Module):
    """Raw latents of a whole clip to its frames in [-1, 1]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Float[Tensor, "B C Tz Hz Wz"]) -> Float[Tensor, "B 3 F H W"]:
        return self.decoder(latents).clamp(-1.0, 1.0)


class StepGraph(nn.Module):
    """One chunk of raw latents (and the caches, unless it is the first) to its frames and the next chunk's caches."""

    def __init__(self, decoder: Decoder, addresses: tuple[str, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.addresses = addresses

    def forward(self, latents: Float[Tensor, "B C Tz Hz Wz"], *caches: Tensor) -> tuple[Tensor, ...]:
        past = dict(zip(self.addresses, caches, strict=True)) if caches else None
        future: dict[str, Tensor] = {}
        frames = self.decoder(latents, past, future)
        return frames.clamp(-1.0, 1.0), *(future[address] for address in self.addresses)


def traceable_copy(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy on the CPU in `dtype`, for inference, whose graph fits clips of any length and keeps every eps."""
    traceable = cast_decoder(copy.deepcopy(decoder).to("cpu"), dtype).eval().requires_grad_(False)
    for address, block in decoder.spec.blocks():
        if isinstance(block, UpsampleSpec) and block.temporal is not None:
            replacement: nn.Module = _AnyLengthUpsample(block, address)
        elif isinstance(block, AttentionSpec) and block.context == "clip":
            replacement = _AnyLengthAttention(block, address)
        else:
            continue
        stage, index = split_block(address)
        original = traceable.at(address)
        replacement.load_state_dict(original.state_dict())
        if isinstance(original, Attention):
            replacement.norm = original.norm  # whose eps may be its own, where the decoder was scaled for float16
        traceable.blocks_of(stage)[index] = replacement.to(dtype).eval().requires_grad_(False)
    for parent in list(traceable.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LowRankConv3d):
                replacement = _AnyLengthLowRank(layer.spec, layer.address)
            elif isinstance(layer, Branch) and {layer.spec.expand.operator, layer.spec.contract.operator} == {
                "pointwise"
            }:
                replacement = _RowBranch(layer.spec, layer.address)
            elif isinstance(layer, ChannelRMSNorm) and layer.eps is not None:
                replacement = _KeptEpsNorm(layer.width, layer.spec)
                replacement.eps = layer.eps
            else:
                continue
            replacement.load_state_dict(layer.state_dict())
            setattr(parent, name, replacement.to(dtype).eval().requires_grad_(False))
    return traceable


def cache_name(address: str) -> str:
    """The part of a cache's name after `past_` or `future_`."""
    return address.replace(".", "_")


@torch.no_grad()
def first_caches(decoder: Decoder, latents: Float[Tensor, "B C Tz Hz Wz"]) -> dict[str, Tensor]:
    """The caches after a first step, by layer address, each in its own memory."""
    future: dict[str, Tensor] = {}
    decoder(latents, None, future)
    return {address: cache.contiguous() for address, cache in future.items()}


def dynamic_axes(inputs: Sequence[Tensor]) -> tuple[object, ...]:
    """The dynamic axes of a graph's inputs, by name; those of the caches as multiples of the latents'.

    Args:
        inputs: latents of `trace_grid`, then the caches of a later step.
    """
    batch, frames = Dim("batch", max=MAX_SIZE), Dim("latent_frames", max=MAX_SIZE)
    height, width = Dim("latent_height"), Dim("latent_width")
    axes: list[dict[int, object]] = [{0: batch, 2: frames, 3: height, 4: width}]
    if inputs[0].shape[2] == 1:
        del axes[0][2]
    for cache in inputs[1:]:
        scale = cache.shape[3] // TRACE_GRID[1]
        sides = (height, width) if scale == 1 else (scale * height, scale * width)
        axes.append({0: batch, 3: sides[0], 4: sides[1]})
    return (axes[0], tuple(axes[1:])) if axes[1:] else (axes[0],)
