from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.frames.container import decoded_frames, open_container
from flashvaed_cli.media.video import CropBox, count_frames, iter_frames, probe_video, read_clip
from flashvaed_cli.ownership import is_own_file
from tests.toy import write_toy_clip
from tests.unit.media.media_files import color_card, counting_clip, write_raw

CODEC_TOLERANCE = 0.06  # mean over a card whose four edges 4:2:0 smears; a wrong colour matrix or turn gives > 0.1


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("ten_bit.mp4", "libx264", "yuv420p10le"),
        ("a.mkv", "libx264", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("vp8.webm", "libvpx", "yuv420p"),
    ],
)
@pytest.mark.parametrize("num_frames", [1, 2])
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str, pixel_format: str, num_frames: int) -> None:
    card = color_card(num_frames, 48, 64)
    path = write_raw(tmp_path / name, card, codec=codec, pixel_format=pixel_format)
    info = probe_video(path)
    assert (info.width, info.height, info.fps) == (64, 48, 24)
    assert info.num_frames == (num_frames if path.suffix == ".mp4" else None)
    assert count_frames(path) == num_frames
    clip = read_clip(path)
    assert clip.shape == card.shape
    assert clip.dtype == torch.float32
    assert (clip - card).abs().mean() < CODEC_TOLERANCE


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int) -> None:
    card = color_card(1, 48, 64)
    path = write_raw(tmp_path / "a.mp4", card, rotation=rotation)
    expected = torch.rot90(card, rotation // 90, (2, 3))  # both count counter-clockwise
    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[2:]
    assert (read_clip(path) - expected).abs().mean() < CODEC_TOLERANCE


def test_odd_sizes(tmp_path: Path) -> None:
    card = color_card(2, 241, 321)
    clip = read_clip(write_raw(tmp_path / "odd.webm", card, codec="libvpx-vp9"))
    assert clip.shape == card.shape
    assert (clip - card).abs().mean() < CODEC_TOLERANCE


def test_variable_frame_rate_and_audio_keep_every_frame(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "vfr.mkv", counting_clip(6), times_ms=[0, 10, 300, 310, 900, 2000])
    assert count_frames(path) == read_clip(path).shape[1] == 6
    path = write_raw(tmp_path / "sound.mp4", counting_clip(5), with_audio=True)
    assert count_frames(path) == read_clip(path).shape[1] == 5


def test_ranges_are_exact(tmp_path: Path) -> None:
    clip = counting_clip(24)
    path = write_raw(tmp_path / "a.mp4", clip)  # with B-frames: decoded out of order
    part = read_clip(path, start=7, num_frames=5)
    assert torch.allclose(
        part.mean(dim=(0, 2, 3)), clip[0, 7:12, 0, 0], atol=0.012
    )  # half a step of the levels is 0.025
    assert read_clip(path, start=20, num_frames=50).shape[1] == 4
    assert len(list(iter_frames(path, start=3, stop=3))) == 0
    with pytest.raises(MediaError, match="no frame number 24"):
        read_clip(path, start=24)


def test_max_side_and_crop(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.mp4", color_card(2, 48, 64), rotation=90)
    assert read_clip(path, max_side=32).shape == (3, 2, 32, 24)
    assert read_clip(path, max_side=500).shape == (3, 2, 64, 48)
    whole = read_clip(path, max_side=32)
    assert torch.equal(read_clip(path, max_side=32, crop=CropBox(3, 5, 16, 12)), whole[:, :, 3:19, 5:17])
    with pytest.raises(MediaError, match="does not fit a frame of 32x24"):
        read_clip(path, max_side=32, crop=CropBox(20, 0, 16, 12))


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = torch.ones(3, 1, 64, 64)
    stripes[..., ::2] = -1
    path = write_raw(tmp_path / "a.mkv", stripes, codec="ffv1", pixel_format="bgr0")
    shrunk = read_clip(path, max_side=16)[..., 2:-2]  # the filter's window is cut at the borders
    assert shrunk.abs().max() < 0.02  # grey within two levels; picking every fourth column would give -1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "50%03d.png", "a.webp", "a.bmp", "a.tiff"])
def test_still_images_are_clips_of_one_frame(tmp_path: Path, name: str) -> None:
    card = color_card(1, 48, 64)
    pixels = ((card[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / name)
    info = probe_video(tmp_path / name)
    assert (info.width, info.height, info.num_frames, info.fps) == (64, 48, 1, Fraction(24))
    assert (read_clip(tmp_path / name) - card).abs().mean() < CODEC_TOLERANCE


def test_photo_with_exif_rotation(tmp_path: Path) -> None:
    card = color_card(1, 48, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = ((card[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=98)
    assert (read_clip(tmp_path / "a.jpg") - torch.rot90(card, -1, (2, 3))).abs().mean() < CODEC_TOLERANCE


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    good = write_raw(tmp_path / "good.mp4", color_card(8, 48, 64)).read_bytes()
    contents = {"empty.mp4": b"", "text.mp4": b"hello world\n" * 300, "head.mp4": good[:300], "cut.png": b"\x89PNG\r\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=name):
            probe_video(tmp_path / name)
        with pytest.raises(MediaError, match=name):
            read_clip(tmp_path / name)
    with pytest.raises(MediaError, match=r"nowhere\.mp4 does not exist"):
        probe_video(tmp_path / "nowhere.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        probe_video(tmp_path)


def test_a_file_cut_off_in_the_middle_is_an_error_only_where_it_is_missing(tmp_path: Path) -> None:
    from flashvaed_cli.media.writer import write_video

    noise = torch.rand(3, 12, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "good.mp4", [noise], fps=24)
    content = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError, match=r"cut\.mp4 is damaged or cut off"):
        count_frames(tmp_path / "cut.mp4")
    with pytest.raises(MediaError, match=r"cut\.mp4 is damaged or cut off"):
        read_clip(tmp_path / "cut.mp4")
    assert probe_video(tmp_path / "cut.mp4").num_frames == 12


def test_real_clips(shared_dir: Path) -> None:
    counts = {"intel_asl_night.mkv": 68, "hhoppe_brink_river_640x360.mp4": 20, "bbb_skipping_rope_1s.webm": 24}
    for name, num_frames in counts.items():
        path = shared_dir / "data" / "clips" / name
        if not path.is_file():
            pytest.skip(f"{path} is missing")
        assert count_frames(path) == num_frames
        assert sum(1 for _ in iter_frames(path, max_side=32)) == num_frames
        assert read_clip(path, start=2, num_frames=2, max_side=64).shape[1] == 2


def test_png_with_exif_chunk(tmp_path: Path) -> None:
    """PyAV's list of side data crashes the process on such a file; nothing may ask for it."""
    exif = Image.Exif()
    exif[0x0131] = "a camera"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png", exif=exif)
    for _ in range(5):
        assert probe_video(tmp_path / "a.png").width == 8
        assert read_clip(tmp_path / "a.png")[0].min() == 1


def test_metadata_in_another_encoding_are_no_obstacle(tmp_path: Path) -> None:
    """Old cameras write Latin-1; a brand of other bytes stands in for a title."""
    content = write_toy_clip(tmp_path / "plain.mp4").read_bytes()
    assert content[8:12] == b"isom"
    (tmp_path / "odd.mp4").write_bytes(content[:8] + b"\xe9som" + content[12:])
    assert len(list(decoded_frames(tmp_path / "odd.mp4"))) == len(list(decoded_frames(tmp_path / "plain.mp4")))
    assert not is_own_file(tmp_path / "odd.mp4")


@pytest.mark.parametrize("name", ["clip.mp4", "still.png"])
def test_a_container_is_closed_with_its_file(name: str, tmp_path: Path) -> None:
    if name.endswith(".png"):
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    else:
        write_toy_clip(tmp_path / name)
    with open_container(tmp_path / name) as (container, _):
        assert list(container.decode(video=0))
    with pytest.raises(AssertionError, match="not open"):
        container.seek(0)
