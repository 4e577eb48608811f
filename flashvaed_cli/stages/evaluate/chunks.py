"""Read a clip for `eval`: raw latents chunk by chunk, and the frames that they were encoded from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.decoders.run.streaming import State, encode_step
from flashvaed_cli.decoders.variants.exact import exact_coder
from flashvaed_cli.errors import MediaError
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.media.video import count_frames, iter_frames, probe_video
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.stages.common.clips import raw_latents
from flashvaed_cli.stages.common.loading import Inputs

_PART = 4
"""Latents that are read and judged together, unless the recipe says otherwise."""

Frames = Float[Tensor, "3 T H W"]


@dataclass(frozen=True)
class Chunk:
    """Frames (none for a latent file) and their raw latents; `frames` are not padded."""

    frames: Frames | None
    latents: Float[Tensor, "1 C T Hz Wz"]
    num_frames: int


def open_clip(
    path: Path, inputs: Inputs, recipe: EvalRecipe, progress: Progress
) -> tuple[Iterator[Chunk], int, Fraction]:
    """The chunks of a video or latent file, its number of frames, and frames per second."""
    original = inputs.original
    spec = original.require_decoder().spec
    chunk = recipe.chunk or _PART
    if is_latent_file(path):
        latents = raw_latents(path, recipe.latent_scale, original)
        if len(latents) > 1:
            progress.warn(f"{path} holds {len(latents)} clips: only the first is judged")
        longest = latents.shape[2] if recipe.num_frames is None else spec.num_latents(recipe.num_frames)
        latents = latents[:1, :, :longest].to(inputs.device)
        num_frames = spec.num_frames(latents.shape[2])
        num_frames = min(num_frames, recipe.num_frames or num_frames)
        return (
            _latent_chunks(latents, num_frames, chunk, spec.temporal_factor),
            num_frames,
            Fraction(get_family(original.family).frames_per_second),
        )
    num_frames = count_frames(path)
    num_frames = min(num_frames, recipe.num_frames or num_frames)
    return _video_chunks(path, num_frames, chunk, inputs, recipe), num_frames, probe_video(path).fps


def _latent_chunks(latents: Float[Tensor, "1 C T Hz Wz"], num_frames: int, chunk: int, factor: int) -> Iterator[Chunk]:
    """Chunks of latents; of the last one, only the frames up to `num_frames` count."""
    done = 0
    for start in range(0, latents.shape[2], chunk):
        part = latents[:, :, start : start + chunk]
        count = min(factor * part.shape[2] - (factor - 1 if start == 0 else 0), num_frames - done)
        yield Chunk(None, part, count)
        done += count


def _video_chunks(path: Path, num_frames: int, chunk: int, inputs: Inputs, recipe: EvalRecipe) -> Iterator[Chunk]:
    """Frames cut on latent borders, the last chunk filled up by repeating its last frame, and encoded.

    An encoder that sees frames ahead takes the whole clip as one chunk.
    """
    encoder = exact_coder(inputs.original.require_encoder())
    factor, multiple = encoder.spec.temporal_factor, encoder.spec.spatial_factor
    chunk = chunk if encoder.spec.is_causal else encoder.spec.num_latents(num_frames)
    frames = iter_frames(path, start=0, stop=num_frames, max_side=recipe.max_side)
    past: State | None = None
    done = 0
    while True:
        wanted = 1 + factor * (chunk - 1) if past is None else factor * chunk
        read = [frame for _, frame in zip(range(wanted), frames, strict=False)]
        if not read:
            if done < num_frames:
                raise MediaError(
                    f"{path} gives {done} frames instead of {num_frames}: frames are lost. Download or export it again."
                )
            return
        done += len(read)
        clip = torch.stack(read, dim=1)  # [3, T, H, W]
        if recipe.center_crop is not None:
            clip = _middle_square(clip, recipe.center_crop)
        clip = clip.float() / 127.5 - 1.0
        pixels = _fill_up(clip, factor, multiple, is_first=past is None)[None].to(inputs.device)
        latents, past = encode_step(encoder, pixels, past)
        yield Chunk(clip, latents, clip.shape[1])


def _middle_square(clip: UInt8[Tensor, "3 T H W"], side: int) -> UInt8[Tensor, "3 T S S"]:
    """Resize frames to a shorter side of `side` (bicubic, antialiased, rounded to uint8) and cut the middle square."""
    height, width = clip.shape[-2:]
    size = [max(round(length * side / min(height, width)), side) for length in (height, width)]
    frames = functional.interpolate(
        clip.transpose(0, 1).float(), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    frames = frames[..., top : top + side, left : left + side]
    return frames.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)


def _fill_up(clip: Frames, factor: int, multiple: int, *, is_first: bool) -> Frames:
    """Repeat the last frame, row and column until the encoder takes the clip as a first or later chunk."""
    _, t, h, w = clip.shape
    missing = -(t - 1 if is_first else t) % factor
    for axis, count in ((1, missing), (2, -h % multiple), (3, -w % multiple)):
        if count:
            last = clip.narrow(axis, clip.shape[axis] - 1, 1)
            clip = torch.cat([clip, last.expand(*[count if i == axis else -1 for i in range(4)])], dim=axis)
    return clip
