"""The pictures of one clip for the page: frames of every decoder, differences, and the worst place, as they pass by.

Frames come chunk by chunk and are encoded at once, so a long clip needs memory for its pictures only. Pixels are float
in [-1, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

Frames = Float[Tensor, "3 T H W"]

DIFFERENCE_FULL_SCALE = 32
"""Differences of this many of 255 levels, and larger ones, have the last colour of the scale."""

_MAX_SIDE_PX = 640
_NUM_FRAMES = 12
_QUALITY = 84
_REGION_SHARE = 4  # the worst region is a quarter of the longer side
_REGION_PX = 256


@dataclass(frozen=True)
class WorstPlace:
    """Where the student is furthest from the original.

    Attributes:
        frame: its number in the clip.
        psnr_db: the student's PSNR to the original in that frame.
        box: left, top, right, bottom in pixels of the clip.
        views: label to the region, enlarged, as WebP.
    """

    frame: int
    psnr_db: float
    box: tuple[int, int, int, int]
    views: Mapping[str, bytes]


@dataclass(frozen=True)
class ClipAlbum:
    """One clip for the page.

    Attributes:
        clip: name of its file.
        labels: `video` (if there is one), the original, then the students.
        original: the label that differences are to.
        frame_numbers: of the pictures.
        frames: label to a WebP per frame number.
        differences: student to a WebP per frame number: the absolute difference to the original.
        psnr_to_original, psnr_to_video: label to decibels per frame of the clip.
        worst: of the first student; None where there is none.
        videos: label to a small MP4; empty where there was no room.
    """

    clip: str
    labels: tuple[str, ...]
    original: str
    num_frames: int
    height: int
    width: int
    frame_numbers: tuple[int, ...]
    frames: Mapping[str, tuple[bytes, ...]]
    differences: Mapping[str, tuple[bytes, ...]]
    psnr_to_original: Mapping[str, tuple[float, ...]]
    psnr_to_video: Mapping[str, tuple[float, ...]]
    worst: WorstPlace | None
    videos: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def students(self) -> tuple[str, ...]:
        """The decoders that are compared with the original."""
        return tuple(self.differences)

    @property
    def worst_psnr_db(self) -> float:
        """Of the worst place; infinity where there is none."""
        return math.inf if self.worst is None else self.worst.psnr_db


class AlbumBuilder:
    """Collects an album while a clip is decoded."""

    def __init__(self, clip: str, num_frames: int, *, video: str, original: str, students: Sequence[str]) -> None:
        """Start empty.

        Args:
            num_frames: of the whole clip; decides which frames are pictured.
            video, original, students: the labels that `update` gets; `video` may be missing there.
        """
        self._clip, self._num_frames = clip, num_frames
        self._video, self._original, self._students = video, original, tuple(students)
        self._wanted = frames_to_show(num_frames)
        self._done = 0
        self._size = (0, 0)
        self._frames: dict[str, list[bytes]] = {}
        self._differences: dict[str, list[bytes]] = {name: [] for name in students}
        self._to_original: dict[str, list[float]] = {name: [] for name in students}
        self._to_video: dict[str, list[float]] = {}
        self._worst: tuple[float, int, dict[str, UInt8[Tensor, "H W 3"]]] | None = None

    def update(self, views: Mapping[str, Frames]) -> None:
        """Add the next frames of every decoder, and of the video if there is one."""
        original = views[self._original]
        self._size = (original.shape[-2], original.shape[-1])
        for name in self._students:
            self._to_original[name] += psnr_per_frame(views[name], original)
        if self._video in views:
            for name in (self._original, *self._students):
                self._to_video.setdefault(name, []).extend(psnr_per_frame(views[name], views[self._video]))
        self._note_worst(views)
        for index in range(original.shape[1]):
            if self._done + index in self._wanted:
                self._picture({label: to_bytes(frames[:, index]) for label, frames in views.items()})
        self._done += original.shape[1]

    def finish(self, videos: Mapping[str, bytes] | None = None) -> ClipAlbum:
        """The album of what came."""
        return ClipAlbum(
            clip=self._clip,
            labels=tuple(self._frames),
            original=self._original,
            num_frames=self._done,
            height=self._size[0],
            width=self._size[1],
            frame_numbers=tuple(number for number in self._wanted if number < self._done),
            frames={label: tuple(pictures) for label, pictures in self._frames.items()},
            differences={label: tuple(pictures) for label, pictures in self._differences.items()},
            psnr_to_original={label: tuple(values) for label, values in self._to_original.items()},
            psnr_to_video={label: tuple(values) for label, values in self._to_video.items()},
            worst=self._worst_place(),
            videos=videos or {},
        )

    def _picture(self, pictures: Mapping[str, UInt8[Tensor, "H W 3"]]) -> None:
        for label, picture in pictures.items():
            self._frames.setdefault(label, []).append(encode(shrunk(Image.fromarray(picture.numpy()))))
        for name in self._students:
            picture = difference_map(pictures[name], pictures[self._original])
            self._differences[name].append(encode(shrunk(picture)))

    def _note_worst(self, views: Mapping[str, Frames]) -> None:
        if not self._students:
            return
        first = self._students[0]
        values = self._to_original[first][-views[first].shape[1] :]
        index = min(range(len(values)), key=values.__getitem__)
        if self._worst is None or values[index] < self._worst[0]:
            pictures = {label: to_bytes(frames[:, index]) for label, frames in views.items()}
            self._worst = (values[index], self._done + index, pictures)

    def _worst_place(self) -> WorstPlace | None:
        if self._worst is None:
            return None
        decibels, number, pictures = self._worst
        box = worst_box(pictures[self._students[0]], pictures[self._original])
        views = {label: encode(enlarged(Image.fromarray(p.numpy()).crop(box))) for label, p in pictures.items()}
        difference = difference_map(pictures[self._students[0]], pictures[self._original])
        views["difference"] = encode(enlarged(difference.crop(box)))
        return WorstPlace(number, decibels, box, views)


def frames_to_show(num_frames: int) -> tuple[int, ...]:
    """Numbers of at most twelve frames, spread evenly, first and last among them."""
    if num_frames <= _NUM_FRAMES:
        return tuple(range(num_frames))
    return tuple(round(i * (num_frames - 1) / (_NUM_FRAMES - 1)) for i in range(_NUM_FRAMES))


def psnr_per_frame(frames: Frames, reference: Frames) -> list[float]:
    """Decibels of each frame, values clamped to [-1, 1]; infinite where two frames are the same."""
    errors = (frames.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean(dim=(0, 2, 3))
    return [math.inf if error == 0 else 10 * math.log10(4 / error) for error in errors.tolist()]


def worst_box(picture: UInt8[Tensor, "H W 3"], reference: UInt8[Tensor, "H W 3"]) -> tuple[int, int, int, int]:
    """The square with the greatest mean difference: left, top, right, bottom. A quarter of the longer side."""
    height, width = picture.shape[:2]
    side = min(height, width, max(32, max(height, width) // _REGION_SHARE))
    step = max(1, side // 8)
    error = (picture.float() - reference.float()).abs().mean(dim=2)[None, None]  # [1, 1, H, W]
    means = functional.avg_pool2d(error, side, stride=step)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return column * step, row * step, column * step + side, row * step + side


def difference_map(picture: UInt8[Tensor, "H W 3"], reference: UInt8[Tensor, "H W 3"]) -> Image.Image:
    """The absolute difference, mean over red, green and blue, in the colours of matplotlib's magma."""
    levels = (picture.float() - reference.float()).abs().mean(dim=2)  # [H, W]
    return Image.fromarray(_colours()[(levels * 255 / DIFFERENCE_FULL_SCALE).round().clamp(0, 255).byte().numpy()])


def scale_bar() -> bytes:
    """The colours of the difference maps from left (equal) to right, as WebP."""
    return encode(Image.fromarray(np.repeat(_colours()[None], 12, axis=0)))


def to_bytes(frame: Float[Tensor, "3 H W"]) -> UInt8[Tensor, "H W 3"]:
    """Pixels in [-1, 1] as levels from 0 to 255."""
    return ((frame.detach().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()


def encode(picture: Image.Image) -> bytes:
    """WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def shrunk(picture: Image.Image) -> Image.Image:
    """At most 640 pixels on the longer side."""
    scale = _MAX_SIDE_PX / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def enlarged(picture: Image.Image) -> Image.Image:
    """By a whole number, to about 256 pixels; pixels stay squares."""
    factor = max(1, round(_REGION_PX / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _colours() -> UInt8[np.ndarray, "256 3"]:
    from matplotlib import colormaps

    return (colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
