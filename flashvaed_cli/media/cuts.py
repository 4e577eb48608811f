"""Training clips: which windows to cut from which files, decided by a seed before anything is encoded.

A window starts at any frame of a video, and it is cut before encoding: a causal VAE makes its first latent from one
frame alone and the others from several, so only a clip that is encoded from its first frame on has latents like
those that a decoder meets. For the same reason an encoded clip (and a latent file) may be shortened only at its end,
while any rectangle may be cut from it: all places of the latent grid are alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.latent_files import is_latent_file, load_latents
from flashvaed_cli.media.video import CropBox, Window, count_frames, probe_video, read_windows, scaled_size

_MAX_JOB_VALUES = 64_000_000  # pixels times colours that one job decodes and hands over at once
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class ClipSize:
    """Frames, height and width, in pixels or on the latent grid."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Bucket:
    """A size to cut clips to; None takes the whole side."""

    num_frames: int
    height: int | None
    width: int | None

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height or 'whole'}x{self.width or 'whole'}"

    def cut(self, size: ClipSize) -> ClipSize:
        """What is left of a clip of this size: at most the bucket's."""
        return ClipSize(
            min(size.num_frames, self.num_frames),
            size.height if self.height is None else min(size.height, self.height),
            size.width if self.width is None else min(size.width, self.width),
        )

    def fills(self, size: ClipSize) -> bool:
        """Whether a clip of this size is large enough in every direction."""
        wanted = ClipSize(self.num_frames, self.height or 1, self.width or 1)
        return size.num_frames >= wanted.num_frames and size.height >= wanted.height and size.width >= wanted.width


@dataclass(frozen=True)
class LatentGrid:
    """What a VAE compresses by."""

    temporal_factor: int
    spatial_factor: int

    def shrink(self, bucket: Bucket) -> Bucket:
        """The bucket on the latent grid: 1 + n frames, sides rounded up (the encoder's input is padded)."""
        sides = (None if s is None else -(-s // self.spatial_factor) for s in (bucket.height, bucket.width))
        return Bucket(1 + (bucket.num_frames - 1) // self.temporal_factor, *sides)

    def whole_frames(self, num_frames: int) -> int:
        """The most frames 1 + temporal_factor * n within `num_frames`."""
        return 1 + (num_frames - 1) // self.temporal_factor * self.temporal_factor


@dataclass(frozen=True)
class CutSettings:
    """How clips are cut from files.

    Attributes:
        buckets: in frames and pixels.
        exact: a clip has the size of a bucket, and files too small for all are left out; otherwise it has what the
            file gives, up to the one bucket's size.
        num_clips: how many to draw; equal ones count once.
        max_side: shrink frames first so that their longer side has at most this many pixels.
    """

    buckets: tuple[Bucket, ...]
    exact: bool
    num_clips: int
    max_side: int | None
    seed: int


@dataclass(frozen=True)
class FileSize:
    """What there is to cut from: `num_items` clips of a size in a latent file (in latents), one in a video."""

    num_items: int
    size: ClipSize


@dataclass(frozen=True)
class ClipCut:
    """One clip to load: a window of a video (in pixels), or of one item of a latent file (in latents)."""

    number: int
    path: Path
    item: int
    window: Window


@dataclass(frozen=True)
class CutPlan:
    """The clips to load, and the files left out with the reason."""

    cuts: tuple[ClipCut, ...]
    skipped: dict[Path, str]


def file_order(paths: Sequence[Path], seed: int) -> list[Path]:
    """The order in which files take turns: shuffled, so that few clips are spread over all of them."""
    order = list(dict.fromkeys(paths))
    return random.Random(f"files {seed}").sample(order, len(order))


def measure_file(path: Path, max_side: int | None, latent_width: int) -> FileSize | str:
    """The size of a file after scaling, read to its end; or what is wrong with it."""
    try:
        if is_latent_file(path):
            num_items, _, *size = load_latents(path, latent_width=latent_width).shape
            return FileSize(num_items, ClipSize(*size))
        info = probe_video(path)
        return FileSize(1, ClipSize(count_frames(path), *scaled_size(info.height, info.width, max_side)))
    except MediaError as error:
        return str(error)


def plan_cuts(measured: Iterable[tuple[Path, FileSize | str]], settings: CutSettings, grid: LatentGrid) -> CutPlan:
    """Let the files that fit take turns, each time with another of the buckets that it fits, at a random place.

    The plan of fewer clips is the beginning of the plan of more: every clip has random numbers of its own.

    Args:
        measured: files in `file_order` with what `measure_file` says of them; taken only as far as needed.
    Raises:
        MediaError: no file can be used.
    """
    usable: list[tuple[Path, FileSize, list[Bucket]]] = []
    skipped: dict[Path, str] = {}
    num_files = 0
    for path, size in measured:
        num_files += 1
        buckets = [] if isinstance(size, str) else _fitting(path, size, settings, grid)
        if isinstance(size, str):
            skipped[path] = size
        elif buckets:
            usable.append((path, size, buckets))
        else:
            listed = ", ".join(str(bucket) for bucket in settings.buckets)
            unit = "latents of " if is_latent_file(path) else ""
            skipped[path] = f"too short or too small for every bucket ({listed}): {unit}{size.size}"
        if len(usable) == settings.num_clips:
            break
    if not usable:
        raise none_usable(num_files, skipped)
    cuts: dict[tuple, ClipCut] = {}
    for number in range(settings.num_clips):
        turn, place = divmod(number, len(usable))
        path, size, buckets = usable[place]
        cut = _draw(
            number, path, turn % size.num_items, size.size, buckets[(turn + place) % len(buckets)], settings, grid
        )
        cuts.setdefault((cut.path, cut.item, cut.window), cut)
    return CutPlan(tuple(cuts.values()), skipped)


def none_usable(num_files: int, skipped: dict[Path, str]) -> MediaError:
    """The error of a run without data: the first reasons."""
    reasons = [reason if str(path) in reason else f"{path}: {reason}" for path, reason in skipped.items()]
    named = "; ".join(reasons[:_MAX_NAMES_SHOWN])
    none = "The only file cannot" if num_files == 1 else f"None of the {num_files} files can"
    return MediaError(f"{none} be used: {named or 'no file was given'}")


def decoding_jobs(cuts: Sequence[ClipCut]) -> list[tuple[ClipCut, ...]]:
    """Cuts of one file together, in the order of their frames, so that each job passes over its file once."""
    by_path: dict[Path, list[ClipCut]] = {}
    for cut in cuts:
        by_path.setdefault(cut.path, []).append(cut)
    jobs: list[tuple[ClipCut, ...]] = []
    for group in by_path.values():
        job: list[ClipCut] = []
        num_values = 0
        for cut in sorted(group, key=lambda cut: (cut.item, cut.window.start)):
            if job and num_values + _num_values(cut) > _MAX_JOB_VALUES:
                jobs.append(tuple(job))
                job, num_values = [], 0
            job.append(cut)
            num_values += _num_values(cut)
        jobs.append(tuple(job))
    return jobs


def load_cuts(cuts: Sequence[ClipCut], max_side: int | None, latent_width: int) -> list[np.ndarray | str]:
    """Load clips of one file: stored RGB bytes [3, T, H, W] or float32 latents [C, T, Hz, Wz], or what is wrong.

    Arrays and no tensors, because these would travel between processes by shared memory, of which containers
    often have little.
    """
    path = cuts[0].path
    loaded: list[np.ndarray | str] = [
        f"{path} ends before frame {cut.window.start + cut.window.num_frames}. Was it changed or cut off meanwhile?"
        for cut in cuts
    ]
    try:
        if is_latent_file(path):
            latents = load_latents(path, latent_width=latent_width)
            return [cut_latents(latents[cut.item], cut.window).contiguous().numpy() for cut in cuts]
        for place, pixels in read_windows(path, [cut.window for cut in cuts], max_side=max_side):
            loaded[place] = pixels.numpy()
    except MediaError as error:
        return [str(error) if isinstance(one, str) else one for one in loaded]
    return loaded


def cut_latents(latents: Float[Tensor, "*B T Hz Wz"], window: Window) -> Float[Tensor, "*B t hz wz"]:
    """A prefix in time and a rectangle in space of latents."""
    if window.start:
        raise ValueError(f"latents are shortened only at their end, and not to start at {window.start}")
    if window.crop is None:
        return latents[..., : window.num_frames, :, :]
    box = window.crop
    return latents[..., : window.num_frames, box.top : box.top + box.height, box.left : box.left + box.width]


def _fitting(path: Path, size: FileSize, settings: CutSettings, grid: LatentGrid) -> list[Bucket]:
    if not settings.exact:
        return list(settings.buckets)
    in_latents = is_latent_file(path)
    return [b for b in settings.buckets if (grid.shrink(b) if in_latents else b).fills(size.size)]


def _draw(
    number: int, path: Path, item: int, size: ClipSize, bucket: Bucket, settings: CutSettings, grid: LatentGrid
) -> ClipCut:
    rng = random.Random(f"clip {settings.seed} {number}")
    if is_latent_file(path):
        cut, start = grid.shrink(bucket).cut(size), 0
    else:
        cut = bucket.cut(size)
        cut = ClipSize(grid.whole_frames(cut.num_frames), cut.height, cut.width)
        start = rng.randint(0, size.num_frames - cut.num_frames)
    top, left = rng.randint(0, size.height - cut.height), rng.randint(0, size.width - cut.width)
    return ClipCut(number, path, item, Window(start, cut.num_frames, CropBox(top, left, cut.height, cut.width)))


def _num_values(cut: ClipCut) -> int:
    box = cut.window.crop
    return 0 if box is None else 3 * cut.window.num_frames * box.height * box.width
