from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.clips import ClipRequest, load_clip, plan_clips
from flashvaed_cli.media.video import CropBox
from tests.unit.media.media_files import color_card, counting_clip, write_raw


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "broken.mp4").write_bytes(b"no video")
    return [
        write_raw(folder / "long.mp4", counting_clip(24)),
        folder / "broken.mp4",
        write_raw(folder / "short.mkv", counting_clip(3)),
        write_raw(folder / "wide.mp4", color_card(9, 32, 96)),
    ]


def _plan(
    files: list[Path], *, num_clips: int = 7, seed: int = 0, crop_size: tuple[int, int] | None = (16, 24)
) -> tuple[list[ClipRequest], dict[Path, str]]:
    return plan_clips(files, num_clips=num_clips, num_frames=5, max_side=64, crop_size=crop_size, seed=seed)


def test_same_seed_same_plan(files: list[Path]) -> None:
    assert _plan(files) == _plan(files)
    assert _plan(files) != _plan(files, seed=1)


def test_files_take_turns_and_broken_ones_are_reported(files: list[Path]) -> None:
    plan, broken = _plan(files)
    assert Counter(request.path.name for request in plan) == {"long.mp4": 3, "short.mkv": 2, "wide.mp4": 2}
    assert [path.name for path in broken] == ["broken.mp4"]
    assert "cannot be opened" in broken[files[1]]


def test_what_is_planned_is_what_loads(files: list[Path]) -> None:
    plan, _ = _plan(files)
    for request in plan:
        assert request.num_frames == (3 if request.path.name == "short.mkv" else 5)
        assert request.crop is not None
        clip = load_clip(request)
        assert clip.shape == (3, request.num_frames, request.crop.height, request.crop.width)
        if request.path.name == "long.mp4":
            first = clip[:, 0].mean().item()
            assert first == pytest.approx(request.start / 20 - 0.8, abs=0.012)  # the frame tells its index


def test_frames_smaller_than_the_crop_are_cut_less(files: list[Path]) -> None:
    plan, _ = _plan(files[-1:], crop_size=(64, 48))  # 32x96 shrinks to 21x64
    assert {(request.crop.height, request.crop.width) for request in plan if request.crop} == {(21, 48)}
    assert load_clip(_plan(files[-1:], crop_size=None)[0][0]).shape == (3, 5, 21, 64)


def test_fewer_clips_than_files(files: list[Path]) -> None:
    drawn = {_plan(files, num_clips=1, seed=seed)[0][0].path.name for seed in range(12)}
    assert drawn == {"long.mp4", "short.mkv", "wide.mp4"}


def test_only_broken_files(files: list[Path], tmp_path: Path) -> None:
    torch.save(torch.zeros(1), tmp_path / "latents.pth")
    with pytest.raises(MediaError, match=r"None of the 2 files .*broken\.mp4.*latents\.pth holds latents"):
        _plan([files[1], tmp_path / "latents.pth"])


def test_a_file_that_changed_since_is_an_error(files: list[Path]) -> None:
    with pytest.raises(MediaError, match="gives 3 frames from number 0 on instead of 5"):
        load_clip(ClipRequest(files[2], 0, 5, None, CropBox(0, 0, 8, 8)))
