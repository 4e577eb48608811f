from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.video import count_frames, probe_video, read_clip
from flashvaed_cli.media.writer import VideoWriter, write_video
from tests.unit.media.media_files import color_card


@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 64, 64), (2, 64, 48), (3, 1, 1), (3, 33, 49)])
def test_round_trip(tmp_path: Path, num_frames: int, height: int, width: int) -> None:
    card = color_card(num_frames, height, width)
    chunks = (card[:, index : index + 2] for index in range(0, num_frames, 2))
    assert write_video(tmp_path / "new" / "a.mp4", chunks, fps=Fraction(30000, 1001), crf=4) == num_frames
    info = probe_video(tmp_path / "new" / "a.mp4")
    assert info.num_frames == count_frames(info.path) == num_frames
    assert info.fps == Fraction(30000, 1001)
    assert (info.height, info.width) == (height + height % 2, width + width % 2)
    error = (read_clip(info.path)[:, :, :height, :width] - card).abs()
    assert error.median() < 0.01  # flat colours survive within one level of 8 bits; edges are smeared by 4:2:0
    assert [path.name for path in info.path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path) -> None:
    clip = torch.zeros(3, 1, 5, 5)
    clip[..., -1, :] = 0.8
    write_video(tmp_path / "a.mp4", [clip], fps=24, crf=1)
    assert torch.allclose(read_clip(tmp_path / "a.mp4")[..., 5, :5], torch.tensor(0.8), atol=0.05)


def test_format_plays_everywhere(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [color_card(2, 32, 32)], fps=24)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)  # BT.709


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [torch.full((3, 1, 16, 16), 7.0)], fps=24)
    assert read_clip(tmp_path / "a.mp4").min() > 0.97


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield color_card(2, 32, 32)
        raise OSError("the decoder broke")

    target = tmp_path / "a.mp4"
    with pytest.raises(OSError, match="the decoder broke"):
        write_video(target, failing(), fps=24)
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="the decoder broke"):
        write_video(target, failing(), fps=24)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_target_appears_only_when_complete(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=24) as writer:
        writer.write(color_card(4, 32, 32))
        assert not (tmp_path / "a.mp4").exists()
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"No frame arrived for .*a\.mp4"):
        write_video(tmp_path / "a.mp4", [], fps=24)
    with pytest.raises(MediaError, match="0 frames per second"):
        write_video(tmp_path / "a.mp4", [], fps=0)
    with pytest.raises(ValueError, match="NaN"):
        write_video(tmp_path / "a.mp4", [torch.full((3, 1, 8, 8), torch.nan)], fps=24)
    with pytest.raises(ValueError, match="those before it"):
        write_video(tmp_path / "a.mp4", [color_card(1, 8, 8), color_card(1, 8, 10)], fps=24)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match="Cannot write"):
        write_video(tmp_path / "file" / "a.mp4", [color_card(1, 8, 8)], fps=24)
