"""What comes out of unusual, damaged and deceiving files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange
from PIL import Image

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.video import count_frames, probe_video, read_clip
from tests.unit.media.media_files import color_card, write_raw

BT709_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
SHOWN = {"grey": (176, 176, 176), "red": (192, 32, 32), "dark": (20, 24, 22)}


def sdr_light(levels: tuple[int, int, int]) -> np.ndarray:
    code = np.array(levels) / 255
    return BT709_TO_BT2020 @ np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def pq(levels: tuple[int, int, int]) -> np.ndarray:
    y = (sdr_light(levels) * 203 / 1e4) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(levels: tuple[int, int, int]) -> np.ndarray:
    display = sdr_light(levels) * 203 / 1000
    scene = display * (display @ np.array([0.2627, 0.6780, 0.0593])) ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def write_hdr(path: Path, codes: list[np.ndarray], transfer: int) -> Path:
    """Patches of 32 x 32, side by side, in BT.2020 with ten bits."""
    pixels = np.concatenate([np.broadcast_to(one * 65535, (32, 32, 3)) for one in codes], axis=1).astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb48le").reformat(
        format="yuv420p10le", dst_colorspace=9, dst_color_range=ColorRange.MPEG
    )
    frame.colorspace, frame.color_range, frame.pts = 9, 1, 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 9, 1, 9, transfer
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("curve", "transfer", "name"), [(pq, 16, "PQ"), (hlg, 18, "HLG")])
def test_hdr_is_shown_as_sdr_shows_it(tmp_path: Path, curve: Callable, transfer: int, name: str) -> None:
    path = write_hdr(tmp_path / "hdr.mkv", [curve(levels) for levels in SHOWN.values()], transfer)
    levels = ((read_clip(path) + 1) * 127.5)[:, 0, 16, 16::32].T
    assert (levels - torch.tensor(list(SHOWN.values()))).abs().max() <= 2  # ten bits and 4:2:0
    assert f"HDR ({name}), tone-mapped" in (probe_video(path).tone_mapping or "")


def test_highlights_keep_their_order_and_hue(tmp_path: Path) -> None:
    nits = [np.array([level] * 3) for level in (203, 400, 700, 1000)] + [np.array([900, 450, 450])]
    power = [(light / 1e4) ** 0.1593017578125 for light in nits]
    codes = [((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375 for y in power]
    levels = ((read_clip(write_hdr(tmp_path / "hdr.mkv", codes, 16)) + 1) * 127.5)[:, 0, 16, 16::32].T
    greys = levels[:4, 0]
    assert (greys.diff()[:2] > 3).all()
    assert (greys[0], greys[-1]) == (229, 255)
    assert levels[4, 0] > levels[4, 1] + 30


def test_sdr_is_not_touched(tmp_path: Path) -> None:
    assert probe_video(write_raw(tmp_path / "a.mp4", color_card(1, 48, 64))).tone_mapping is None


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.apng", "a.gif"])
def test_animated_images_are_clips(tmp_path: Path, name: str) -> None:
    card = color_card(3, 48, 64)
    pixels = ((card + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    frames = [Image.fromarray(one // (t + 1)) for t, one in enumerate(pixels)]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], duration=40,
        format="PNG" if name == "a.apng" else None, **options,
    )  # fmt: skip
    info, clip = probe_video(tmp_path / name), read_clip(tmp_path / name)
    assert (info.num_frames or 3, info.fps, info.width, count_frames(tmp_path / name)) == (3, 25, 64, 3)
    expected = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(3, 0, 1, 2)
    assert ((clip + 1) * 127.5 - expected).abs().mean() < 6  # a GIF has 256 colours
    content = (tmp_path / name).read_bytes()
    if name != "a.gif":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(MediaError, match=f"{name} is damaged"):
            read_clip(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff", "a.bmp"])
def test_half_an_image_is_damaged(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError, match=name):
        read_clip(tmp_path / name)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.avi", "mpeg4"),
                                             ("a.mpg", "mpeg2video"), ("a.webm", "libvpx-vp9")])  # fmt: skip
def test_a_bad_block_is_damage_and_not_concealed(tmp_path: Path, name: str, codec: str) -> None:
    columns = torch.arange(96) + 3 * torch.arange(24)[:, None]
    texture = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) / 4
    clip = (columns.mul(5).remainder(256) / 128 - 1)[None, :, None] * 0.7 + texture  # [1, 24, 64, 96]
    whole = write_raw(tmp_path / name, clip.expand(3, -1, -1, -1), codec=codec).read_bytes()
    assert read_clip(tmp_path / name).shape[1] == 24
    num_found = 0
    for share in (0.35, 0.45, 0.55, 0.65):
        content, place = bytearray(whole), int(share * len(whole))
        content[place : place + 200] = bytes(200)
        (tmp_path / name).write_bytes(content)
        try:
            read_clip(tmp_path / name)
        except MediaError as error:
            num_found += f"{name} is damaged" in str(error)
    assert num_found  # zeros can happen to be pictures


def test_a_stream_that_begins_inside_a_group_of_pictures(tmp_path: Path) -> None:
    noise = torch.rand(3, 40, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    content = write_raw(tmp_path / "a.ts", noise).read_bytes()
    (tmp_path / "a.ts").write_bytes(content[len(content) // 188 // 4 * 188 :])
    for read in (probe_video, count_frames, read_clip):
        with pytest.raises(MediaError, match="begins inside a group of pictures"):
            read(tmp_path / "a.ts")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.gif"])
def test_playlists_are_refused(tmp_path: Path, name: str) -> None:
    neighbour = write_raw(tmp_path / "secret.mp4", color_card(2, 48, 64))
    playlists = [
        f"ffconcat version 1.0\nfile {neighbour.name}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{neighbour.name}\n#EXT-X-ENDLIST\n",
    ]
    for text in playlists:
        (tmp_path / name).write_text(text)
        for read in (probe_video, count_frames, read_clip):
            with pytest.raises(MediaError, match=name):
                read(tmp_path / name)
