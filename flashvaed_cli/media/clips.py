"""Which clips to cut from which files: a seeded plan, made before anything is loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cuts import none_usable
from flashvaed_cli.media.latent_files import is_latent_file, load_latents
from flashvaed_cli.media.video import CropBox, count_frames, probe_video, read_clip, scaled_size


@dataclass(frozen=True)
class ClipRequest:
    """One clip to load: frames [start, start + num_frames) of a file, scaled, then cropped."""

    path: Path
    start: int
    num_frames: int
    max_side: int | None
    crop: CropBox | None


def plan_clips(
    paths: Sequence[Path],
    *,
    num_clips: int,
    num_frames: int,
    max_side: int | None,
    crop_size: tuple[int, int] | None,
    seed: int,
) -> tuple[list[ClipRequest], dict[Path, str]]:
    """Spread clips over the files in turn, each with a random start and crop position.

    With fewer clips than files, the seed draws the files. The same arguments and files give the same plan.
    A video shorter than `num_frames` gives all it has, and a frame smaller than `crop_size` is cropped
    less: the requests say what will be loaded.

    Args:
        crop_size: height and width in pixels, after scaling to `max_side`.
    Returns:
        The plan of `num_clips` requests, and the broken files with what is wrong with them. Only files that
        the plan needs are opened, so a broken one may go unnoticed.
    Raises:
        MediaError: no file can be read.
    """
    if min(num_clips, num_frames, *(crop_size or ())) < 1:
        raise ValueError("num_clips, num_frames and crop_size must be at least 1")
    rng = random.Random(seed)
    order = list(dict.fromkeys(Path(path) for path in paths))
    candidates = rng.sample(order, len(order)) if num_clips < len(order) else order
    sizes, broken = _measure(candidates, num_clips)
    if not sizes:
        raise none_usable(len(order), broken)
    healthy = [path for path in order if path in sizes]
    plan = []
    for index in range(num_clips):
        path = healthy[index % len(healthy)]
        available, height, width = sizes[path]
        height, width = scaled_size(height, width, max_side)
        length = min(num_frames, available)
        start = rng.randint(0, available - length)
        crop = None if crop_size is None else _draw_crop(rng, height, width, crop_size)
        plan.append(ClipRequest(path=path, start=start, num_frames=length, max_side=max_side, crop=crop))
    return plan, broken


def usable_files(
    paths: Sequence[Path], limit: int | None = None, *, latent_width: int | None = None
) -> tuple[list[Path], dict[Path, str]]:
    """The first `limit` files that can be read to the end, and what is wrong with the others that were tried.

    Args:
        latent_width: channels that latent files must have.

    Raises:
        MediaError: no file can be read.
    """
    usable: list[Path] = []
    broken: dict[Path, str] = {}
    for path in paths:
        if limit is not None and len(usable) == limit:
            break
        try:
            if is_latent_file(path):
                load_latents(path, latent_width=latent_width)
            else:
                probe_video(path)
                count_frames(path)
            usable.append(path)
        except MediaError as error:
            broken[path] = str(error)
    if not usable:
        raise none_usable(len(paths), broken)
    return usable, broken


def load_clip(request: ClipRequest) -> Float[Tensor, "C T H W"]:
    """Load one planned clip as RGB in [-1, 1].

    Raises:
        MediaError: the file cannot be read, or has changed since it was planned.
    """
    clip = read_clip(
        request.path,
        start=request.start,
        num_frames=request.num_frames,
        max_side=request.max_side,
        crop=request.crop,
    )
    if clip.shape[1] != request.num_frames:
        raise MediaError(
            f"{request.path} gives {clip.shape[1]} frames from number {request.start} on instead of "
            f"{request.num_frames}. Was it changed or cut off since? Export it again, or leave it out."
        )
    return clip


def _measure(candidates: Sequence[Path], num_needed: int) -> tuple[dict[Path, tuple[int, int, int]], dict[Path, str]]:
    """Frames, height and width of the first `num_needed` readable files, and the unreadable ones that were tried."""
    sizes: dict[Path, tuple[int, int, int]] = {}
    broken: dict[Path, str] = {}
    for path in candidates:
        if len(sizes) == num_needed:
            break
        try:
            if is_latent_file(path):
                raise MediaError(f"{path} holds latents, but frames are needed here. Give videos or images.")
            info = probe_video(path)
            sizes[path] = (count_frames(path), info.height, info.width)
        except MediaError as error:
            broken[path] = str(error)
    return sizes, broken


def _draw_crop(rng: random.Random, height: int, width: int, crop_size: tuple[int, int]) -> CropBox:
    crop_height, crop_width = min(crop_size[0], height), min(crop_size[1], width)
    top, left = rng.randint(0, height - crop_height), rng.randint(0, width - crop_width)
    return CropBox(top=top, left=left, height=crop_height, width=crop_width)
