"""Spatial tiling without seams: the last blocks of a decoder run on overlapping windows and give the same frames.

Attention sees a whole frame, so everything up to the last attention runs on whole frames, at the size of the latents,
where that is cheap. GroupNorm sees the whole frame too, in its statistics: a decoder that has it up to its head runs
on whole frames only, and tiles are refused. From the *split* on, blocks reach only so far: the sum of the radii of the
kernels that follow, each in units of the split's grid, is the *halo*. A window is its part of the frame plus the halo;
pixels that zero padding at the halo's edge has spoilt are cut away. At the frame's own border there is no halo, since
the zero padding there is the decoder's. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.blocks import BlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import SpecError


@dataclass(frozen=True)
class TileWindow:
    """One axis of a window: rows `start:stop` are read, of which `keep_start:keep_stop` are kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class TileLayout:
    """The windows of a frame: the decoder runs whole up to the block at `split`, then row by column.

    Windows are in units of the split's input; `enlargement` is pixels per unit.
    """

    split: str
    halo: int
    enlargement: int
    rows: tuple[TileWindow, ...]
    columns: tuple[TileWindow, ...]

    @property
    def num_tiles(self) -> int:
        """Number of windows."""
        return len(self.rows) * len(self.columns)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width that every window has."""
        return self.rows[0].stop - self.rows[0].start, self.columns[0].stop - self.columns[0].start


def split_addresses(spec: DecoderSpec) -> tuple[str, ...]:
    """Blocks at which tiling may begin: after the last one that sees whole frames, where a stage begins or, unless a
    bypass spans that place, a frame grows. Empty if nothing after that block works in space.
    """
    blocks = list(spec.blocks())
    whole = [index for index, (_, block) in enumerate(blocks) if block.sees_whole_frames]
    rest = blocks[whole[-1] + 1 :] if whole else blocks
    if all(block.growth == (1, 1, 1) and not _works_in_space(block) for _, block in rest):
        return ()
    bypassed = {stage.name for stage in spec.bypassed().values()}
    grows = {a for a, block in rest if block.growth != (1, 1, 1) and stage_of(a) not in bypassed}
    return tuple(address for address, _ in rest if address.endswith(".0") or address in grows) or (blocks[-1][0],)


def require_tiles(spec: DecoderSpec) -> None:
    """Raise SpecError if a decoder can only run on whole frames, as with GroupNorm up to its head."""
    if not split_addresses(spec):
        address, block = [(address, block) for address, block in spec.blocks() if block.sees_whole_frames][-1]
        raise SpecError(
            f"no tiles: {address} ({block.kind}) takes the statistics of its GroupNorm over whole frames, and tiles "
            f"would give other pixels. Leave the tile out; {_instead(spec)}"
        )


def _works_in_space(block: BlockSpec) -> bool:
    return any(layer.kernel[1:] != (1, 1) for layer in block.layers.values())


def _instead(spec: DecoderSpec) -> str:
    if spec.sees_whole_clip:
        return "a shorter clip length takes less memory, and gives other frames"
    return "chunks of fewer latent frames take less memory too"


def scale_at(spec: DecoderSpec, split: str) -> int:
    """Rows of the split's input per latent. Raises SpecError if there is no such block."""
    scale = 1
    for address, block in spec.blocks():
        if address == split:
            return scale
        scale *= block.growth[1]
    raise SpecError(f"no block {split!r} to begin tiles at; there are {', '.join(split_addresses(spec)) or 'none'}")


def halo_at(spec: DecoderSpec, split: str) -> int:
    """How far around a pixel the frames depend on the split's input, in its units, rounded up.

    Raises:
        SpecError: no such block, or one that sees whole frames comes at or after it.
    """
    scale_at(spec, split)
    blocks = list(spec.blocks())
    index = next(i for i, (address, _) in enumerate(blocks) if address == split)
    reach, scale = Fraction(0), 1
    for address, block in blocks[index:]:
        if block.sees_whole_frames or block.shrinkage != (1, 1, 1):
            raise SpecError(f"tiles cannot begin at {split}: {address} ({block.kind}) after it needs whole frames")
        reach += max(sum(_radius(block, name, scale) for name in path) for path in block.paths)
        scale *= block.growth[1]
    return ceil(reach)


def _radius(block: BlockSpec, name: str, scale: int) -> Fraction:
    """How far a layer reaches, in the split's units; `scale`: rows of its block's input per row of the split's."""
    kernel, rows = block.layers[name].kernel, block.layer_grid(name, (2, 1, 1))[1]
    return Fraction(max(kernel[1], kernel[2]) // 2, scale * rows)


def windows_along(length: int, core: int, halo: int) -> tuple[TileWindow, ...]:
    """Cover an axis with windows of one size: `ceil(length / core)`, or fewer where the halo covers as much.

    All have the same size, so that a compiled decoder sees one shape only. The outer windows have a halo on one side
    and keep more; a window is never larger than `core + 2 halo`.
    """
    count = ceil(length / core)
    size = ceil((length + 2 * halo * (count - 1)) / count)
    if count == 1 or size >= length:
        return (TileWindow(0, length, 0, length),)
    starts = sorted({index * (length - size) // (count - 1) for index in range(count)})
    seams = [0, *(start + halo for start in starts[1:]), length]
    return tuple(TileWindow(start, start + size, seams[i], seams[i + 1]) for i, start in enumerate(starts))


def tile_layout(spec: DecoderSpec, height: int, width: int, *, tile: int, split: str) -> TileLayout:
    """Cut frames of `height` x `width` latents into tiles of about `tile` x `tile` latents.

    Args:
        tile: side of a tile without its halo, in latents; the frame is cut evenly into as many as that takes.
        split: address of the first block that runs tile by tile.
    Raises:
        SpecError: `tile` is below 1, or tiles cannot begin at `split`.
    """
    if tile < 1:
        raise SpecError(f"a tile is at least 1 latent wide, not {tile}")
    halo, scale = halo_at(spec, split), scale_at(spec, split)
    rows, columns = (windows_along(side * scale, tile * scale, halo) for side in (height, width))
    return TileLayout(split, halo, spec.spatial_factor // scale, rows, columns)
