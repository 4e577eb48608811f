"""Video files of every kind that the tests of this room read, written with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor


def color_card(num_frames: int, height: int, width: int) -> Tensor:
    """[3, T, H, W] in [-1, 1]: red, blue, green and grey quarters; a bar that moves down frame by frame."""
    card = torch.full((3, num_frames, height, width), -0.8)
    card[0, :, : height // 2, : width // 2] = 0.9
    card[2, :, : height // 2, width // 2 :] = 0.9
    card[1, :, height // 2 :, : width // 2] = 0.7
    card[:, :, height // 2 :, width // 2 :] = 0.5
    return card


def counting_clip(num_frames: int, height: int = 32, width: int = 48) -> Tensor:
    """Frame t is grey of level t / 20 - 0.8, so that a frame read back tells its index."""
    levels = torch.arange(num_frames) / 20 - 0.8
    return levels.reshape(1, -1, 1, 1).expand(3, -1, height, width)


def write_raw(
    path: Path,
    clip: Tensor,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int | None = None,
    times_ms: list[int] | None = None,
    with_audio: bool = False,
) -> Path:
    """Encode a clip without the program's own writer."""
    frames = ((clip + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = clip.shape[-1], clip.shape[-2], pixel_format
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=8000, layout="mono") if with_audio else None
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels.copy(), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate = 8000
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path
