"""Light decoders for the latents of another network: four shapes, each fitted to the grid of a given original.

They have few norms and no attention, and are trained on the original's frames alone. They double the frames where the
original does: 1 + f (T - 1) frames come out. Only causal layers work in time, so chunks are connected by a state.
Imports no torch.

Shapes:
    tae: chains of three convolutions and nearest upsampling, one width throughout, latents clamped at the entry. For
        video, the first layer of every chain reads the previous frame too.
    temporal-tae: chains on frames; time is seen by causal residual layers of (3, 1, 1) after the first upsampling.
        Departure: the published one is not causal and has GroupNorm over all frames of a clip, attention in each frame
        and bilinear upsampling.
    lean: LeanVAE's gated layers on the grid of the latents, without its iterations, and cells of pixels by a Haar
        transform; only for originals on its grid, 4 x 8 x 8.
    efficientvit: chains of two convolutions, pixel shuffles with copies past them, one RMS norm before the last layer.
        The published decoder of this name has no attention either.

Reference: TAESD and TAEHV (madebyollin); arXiv 2503.04871 (TAE-192, its temporal form and the "EfficientViT" decoder);
DC-AE, arXiv 2410.10733; LeanVAE, arXiv 2503.14325.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import (
    BlockSpec,
    ChainSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import BypassSpec, DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import frame_conv, point_conv, time_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, LatentEntrySpec, NormSpec
from flashvaed_cli.decoders.spec.naf_blocks import CELL, CellHeadSpec, IstaSpec, cell_head_spec, naf_spec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.limits import MAX_WIDTH
from flashvaed_cli.recipe.fields import StudentShape

LightShape = StudentShape

LATENT_LIMIT = 3.0
"""Normalized latents are clamped softly to this magnitude, as in TAESD."""
_COLOURS = 3
_ROUND_TO = 8
_TAE_DEPTHS, _TEMPORAL_DEPTHS = (3, 3, 3, 1), (3, 2, 2, 1)
_EFFICIENT_DEPTHS = (10, 5)
_SHARES: dict[LightShape, float] = {"efficientvit": 1 / 3, "lean": 4 / 3}
_LEAN_BRANCHES = 4  # a quarter of the channels is for low bands, the rest for high bands
_LEAN_FUSION, _LEAN_SEPARATE = 4, 2
_WIDEST_LAYER = 8  # times the width: the shuffle of an efficientvit that doubles frames, rows and columns
_HEAD_NORM = NormSpec(eps=1e-5, gain=True, shift=True)


@dataclass(frozen=True)
class _Ground:
    """What a light decoder has in common with the original: its grid, and the scale of its latents."""

    original: DecoderSpec
    doubles_frames: tuple[bool, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def latent_width(self) -> int:
        return self.original.latent_width

    @property
    def has_time(self) -> bool:
        return self.original.temporal_factor > 1 and not self.original.still

    def decoder(self, stages: Sequence[StageSpec], *, patch: int) -> DecoderSpec:
        """A decoder of these stages with the original's family and factors."""
        original = self.original
        return DecoderSpec(
            family=original.family,
            stages=tuple(stages),
            temporal_factor=original.temporal_factor,
            spatial_factor=original.spatial_factor,
            patch=patch,
            still=original.still,
        )


def light_spec(
    shape: LightShape,
    original: DecoderSpec,
    width: int | None = None,
    *,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> DecoderSpec:
    """A light decoder for the latents of `original`.

    Args:
        width: channels; None: see `default_width`.
        mean, std: of the raw latents, per channel; empty: the decoder reads them raw.
    Raises:
        SpecError: the original grows by other factors than powers of two, the width does not suit the shape, or some
            layer would be wider than `MAX_WIDTH`.
    """
    ground = _Ground(original, _doublings(original), mean, std)
    width = default_width(shape, original) if width is None else width
    if width > MAX_WIDTH // _WIDEST_LAYER:
        raise SpecError(f"{shape} of {width} channels: at most {MAX_WIDTH // _WIDEST_LAYER} are supported")
    return _BUILDERS[shape](ground, width)


def default_width(shape: LightShape, original: DecoderSpec) -> int:
    """A half (efficientvit: a third, lean: four thirds) of the original's widest stream, a multiple of 8: the published
    widths, for Wan."""
    widest = max(block.out_width for _, block in original.blocks())
    width = max(round(widest * _SHARES.get(shape, 1 / 2) / _ROUND_TO), 1) * _ROUND_TO
    step = _latent_step(original.latent_width) if shape == "efficientvit" else 1
    return -(-width // step) * step


def light_shape(spec: DecoderSpec) -> LightShape | None:
    """Which light decoder this is, judged by its blocks; None if it is none."""
    blocks = [block for _, block in spec.blocks()]
    if isinstance(blocks[-1], CellHeadSpec) and not any(isinstance(block, IstaSpec) for block in blocks):
        return "lean"
    if not any(isinstance(block, ChainSpec) for block in blocks):
        return None
    if any(isinstance(block, ShuffleUpsampleSpec) for block in blocks):
        return "efficientvit"
    return "temporal-tae" if any(isinstance(block, ResBlockSpec) for block in blocks) else "tae"


def has_same_blocks(first: DecoderSpec, second: DecoderSpec) -> bool:
    """Whether two decoders have blocks of the same kinds at the same addresses."""
    return [(address, block.kind) for address, block in first.blocks()] == [
        (address, block.kind) for address, block in second.blocks()
    ]


def _doublings(original: DecoderSpec) -> tuple[bool, ...]:
    """For every doubling of the size in the original, whether it doubles the frames too.

    If the original doubles frames alone, they are doubled with the next size that does not double frames already.
    """
    found: list[bool] = []
    pending = 0
    for address, block in original.blocks():
        frames, height, width = block.growth
        if height != width or any(side.bit_count() != 1 for side in block.growth):
            raise SpecError(
                f"no light decoder for {original.family}: {address} makes {block.growth} frames, rows and columns of "
                "one, and light decoders only double"
            )
        pending += frames.bit_length() - 1
        for _ in range(height.bit_length() - 1):
            found.append(pending > 0)
            pending -= pending > 0
    if pending:
        raise SpecError(f"no light decoder for {original.family}: it doubles the frames after the last size")
    return tuple(found)


def _with_previous_frame(width: int) -> ConvSpec:
    return ConvSpec(operator="causal3d", in_width=width, out_width=width, kernel=(2, 3, 3))


def _chain(width: int, *, num_layers: int, sees_past: bool, activates: bool) -> ChainSpec:
    first = _with_previous_frame(width) if sees_past else frame_conv(width, width)
    return ChainSpec(
        conv1=first,
        conv2=frame_conv(width, width),
        conv3=frame_conv(width, width) if num_layers == 3 else None,
        activation="relu" if activates else "none",
    )


def _tae(ground: _Ground, width: int) -> DecoderSpec:
    return _tae_like(ground, width, _TAE_DEPTHS, sees_past=ground.has_time, bottleneck=None)


def _temporal_tae(ground: _Ground, width: int) -> DecoderSpec:
    if not ground.has_time:
        raise SpecError("temporal-tae sees several frames, and this decoder is of single images: take tae")
    on_frame = ResBlockSpec(conv1=frame_conv(width, width), conv2=frame_conv(width, width))
    taps = time_conv(width, width)
    over_time = ResBlockSpec(conv1=taps, conv2=taps)
    middle = StageSpec(name="mid", blocks=(on_frame, over_time) * 2)
    return _tae_like(ground, width, _TEMPORAL_DEPTHS, sees_past=False, bottleneck=middle)


def _tae_like(
    ground: _Ground, width: int, depths: Sequence[int], *, sees_past: bool, bottleneck: StageSpec | None
) -> DecoderSpec:
    """The entry, chains before each upsampling and after the last, the head; `bottleneck` follows the first."""
    entry = LatentEntrySpec(mean=ground.mean, std=ground.std, limit=LATENT_LIMIT)
    conv_in = ConvBlockSpec(conv=frame_conv(ground.latent_width, width), activation="relu", entry=entry)
    stages = [StageSpec(name="conv_in", blocks=(conv_in,))]
    chain = _chain(width, num_layers=3, sees_past=sees_past, activates=True)
    for index, doubles in enumerate(ground.doubles_frames):
        temporal = point_conv(width, 2 * width) if doubles and ground.has_time else None
        upsample = UpsampleSpec(temporal=temporal, spatial=frame_conv(width, width))
        blocks: list[BlockSpec] = [chain] * depths[min(index, len(depths) - 2)]
        stages.append(StageSpec(name=f"up{index}", blocks=(*blocks, upsample)))
        if index == 0 and bottleneck is not None:
            stages.append(bottleneck)
    stages.append(StageSpec(name=f"up{len(ground.doubles_frames)}", blocks=(chain,) * depths[-1]))
    head = HeadSpec(conv=frame_conv(width, _COLOURS * ground.original.patch**2), norm=None, activation="none")
    return ground.decoder([*stages, StageSpec(name="head", blocks=(head,))], patch=ground.original.patch)


def _efficientvit(ground: _Ground, width: int) -> DecoderSpec:
    """A 1x1 that normalizes the latents, the entry, shuffles and chains; the last doubling is in the patches."""
    latent_width, step = ground.latent_width, _latent_step(ground.latent_width)
    if width % step:
        raise SpecError(
            f"efficientvit repeats each of the {latent_width} latent channels a whole number of times: its width is a "
            f"multiple of {step}, not {width}"
        )
    doublings, patch = ground.doubles_frames, ground.original.patch
    if doublings and not (doublings[-1] and ground.has_time):
        doublings, patch = doublings[:-1], 2 * patch
    entry = BypassSpec(kind="duplicate", in_width=latent_width, out_width=2 * width)
    stages = [
        StageSpec(name="post_quant", blocks=(ConvBlockSpec(conv=point_conv(latent_width, latent_width)),)),
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=frame_conv(latent_width, 2 * width)),), bypass=entry),
    ]
    chain = _chain(width, num_layers=2, sees_past=ground.has_time, activates=False)
    before = 2 * width
    for index, doubles in enumerate(doublings):
        frames = 2 if doubles and ground.has_time else 1
        shuffle = ShuffleUpsampleSpec(conv=frame_conv(before, 4 * frames * width), factor=(frames, 2, 2))
        copies = BypassSpec(
            kind="duplicate", in_width=before, out_width=width, temporal_factor=frames, spatial_factor=2
        )
        depth = _EFFICIENT_DEPTHS[min(index, len(_EFFICIENT_DEPTHS) - 1)]
        stages.append(StageSpec(name=f"shuffle{index + 1}", blocks=(shuffle,), bypass=copies))
        stages.append(StageSpec(name=f"up{index + 1}", blocks=(chain,) * depth))
        before = width
    head = HeadSpec(conv=frame_conv(before, _COLOURS * patch**2), norm=_HEAD_NORM, activation="relu")
    return ground.decoder([*stages, StageSpec(name="head", blocks=(head,))], patch=patch)


def _lean(ground: _Ground, width: int) -> DecoderSpec:
    """A 1x1 that normalizes the latents, the entry, gated layers on all channels, then on low and high ones; head."""
    original, latent_width = ground.original, ground.latent_width
    grid = (original.temporal_factor, original.spatial_factor, original.spatial_factor)
    if grid != CELL or original.still:
        raise SpecError(
            f"lean decodes cells of {CELL} frames, rows and columns, and a latent of {original.family} stands for "
            f"{grid}: take tae"
        )
    if width % _LEAN_BRANCHES:
        raise SpecError(f"lean has a branch of a quarter of its channels: its width is a multiple of 4, not {width}")
    low = width // _LEAN_BRANCHES
    stages = (
        StageSpec(name="post_quant", blocks=(ConvBlockSpec(conv=point_conv(latent_width, latent_width)),)),
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=point_conv(latent_width, width)),)),
        StageSpec(name="fusion", blocks=(naf_spec(width),) * _LEAN_FUSION),
        StageSpec(name="branches", blocks=(naf_spec(low, width - low),) * _LEAN_SEPARATE),
        StageSpec(name="head", blocks=(cell_head_spec(low, width - low),)),
    )
    return ground.decoder(stages, patch=1)


def _latent_step(latent_width: int) -> int:
    """What the width of an efficientvit is a multiple of, so that twice the width is one of the latent width."""
    return latent_width // 2 if latent_width % 2 == 0 else latent_width


_BUILDERS: dict[LightShape, Callable[[_Ground, int], DecoderSpec]] = {
    "tae": _tae,
    "temporal-tae": _temporal_tae,
    "efficientvit": _efficientvit,
    "lean": _lean,
}
