from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cuts import (
    Bucket,
    ClipCut,
    ClipSize,
    CutPlan,
    CutSettings,
    FileSize,
    LatentGrid,
    cut_latents,
    decoding_jobs,
    file_order,
    load_cuts,
    measure_file,
    plan_cuts,
)
from flashvaed_cli.media.video import CropBox, Window, from_bytes, read_clip
from tests.unit.media.media_files import color_card, counting_clip, write_raw

GRID = LatentGrid(temporal_factor=4, spatial_factor=8)
LARGE, SMALL = Bucket(17, 64, 96), Bucket(9, 32, 32)

file_sizes = st.builds(
    FileSize, st.just(1), st.builds(ClipSize, st.integers(1, 60), st.integers(1, 200), st.integers(1, 200))
)


def plan(
    sizes: dict[str, FileSize | str],
    *,
    buckets: tuple[Bucket, ...] = (LARGE, SMALL),
    exact: bool = True,
    num_clips: int = 12,
    seed: int = 0,
) -> CutPlan:
    settings = CutSettings(buckets, exact, num_clips, max_side=None, seed=seed)
    order = file_order([Path(name) for name in sizes], seed)
    return plan_cuts(((path, sizes[str(path)]) for path in order), settings, GRID)


def size_of(cut: ClipCut) -> ClipSize:
    assert cut.window.crop is not None
    return ClipSize(cut.window.num_frames, cut.window.crop.height, cut.window.crop.width)


@given(st.lists(file_sizes, min_size=1, max_size=5), st.integers(0, 3), st.booleans())
def test_every_cut_lies_inside_its_file(sizes: list[FileSize], seed: int, exact: bool) -> None:
    files: dict[str, FileSize | str] = {f"{index}.mp4": size for index, size in enumerate(sizes)}
    fitting = [size for size in sizes if any(bucket.fills(size.size) for bucket in (LARGE, SMALL))]
    if exact and not fitting:
        with pytest.raises(MediaError, match="too short or too small for every bucket"):
            plan(files, exact=True, seed=seed)
        return
    for cut in plan(files, exact=exact, seed=seed).cuts:
        have, size = files[str(cut.path)], size_of(cut)
        assert isinstance(have, FileSize) and cut.window.crop is not None
        assert 0 <= cut.window.start <= have.size.num_frames - size.num_frames
        assert 0 <= cut.window.crop.top <= have.size.height - size.height
        assert 0 <= cut.window.crop.left <= have.size.width - size.width
        assert (size.num_frames - 1) % 4 == 0
        assert not exact or size in (ClipSize(17, 64, 96), ClipSize(9, 32, 32))


def test_fewer_clips_are_the_beginning_of_more() -> None:
    sizes: dict[str, FileSize | str] = {f"{i}.mp4": FileSize(1, ClipSize(30 + i, 70, 100)) for i in range(9)}
    sizes["4.mp4"] = "broken"
    many = plan(sizes, num_clips=40)
    for num_clips in (1, 3, 8, 9, 25):
        few = plan(sizes, num_clips=num_clips)
        assert list(few.cuts) == [cut for cut in many.cuts if cut.number < num_clips]
    assert plan(sizes, num_clips=40) == many != plan(sizes, num_clips=40, seed=1)
    assert many.skipped == {Path("4.mp4"): "broken"}


def test_files_serve_the_buckets_that_they_fit() -> None:
    sizes: dict[str, FileSize | str] = {
        "large.mp4": FileSize(1, ClipSize(40, 100, 100)),
        "short.mp4": FileSize(1, ClipSize(12, 100, 100)),
        "flat.mp4": FileSize(1, ClipSize(40, 31, 100)),
        "z.pt": FileSize(2, ClipSize(5, 8, 12)),
    }
    made = plan(sizes, num_clips=24)
    served = {name: {str(size_of(c)) for c in made.cuts if c.path.name == name} for name in sizes}
    assert served == {
        "large.mp4": {"17x64x96", "9x32x32"},
        "short.mp4": {"9x32x32"},
        "flat.mp4": set(),
        "z.pt": {"5x8x12", "3x4x4"},  # on the latent grid
    }
    assert list(made.skipped) == [Path("flat.mp4")]
    assert "too small for every bucket (17x64x96, 9x32x32): 40x31x100" in made.skipped[Path("flat.mp4")]
    assert {cut.item for cut in made.cuts if cut.path.name == "z.pt"} == {0, 1}
    assert not any(cut.window.start for cut in made.cuts if cut.path.name == "z.pt")


def test_equal_clips_count_once() -> None:
    sizes: dict[str, FileSize | str] = {"still.png": FileSize(1, ClipSize(1, 20, 20))}
    made = plan(sizes, buckets=(Bucket(17, None, None),), exact=False, num_clips=50)
    assert [size_of(cut) for cut in made.cuts] == [ClipSize(1, 20, 20)]


def test_what_is_planned_is_what_loads(tmp_path: Path) -> None:
    """Overlapping windows of one pass equal each window read alone."""
    path = write_raw(tmp_path / "a.mp4", color_card(30, 96, 128) * counting_clip(30, 96, 128).abs())
    size = measure_file(path, 100, 16)
    assert size == FileSize(1, ClipSize(30, 75, 100))
    settings = CutSettings((LARGE, SMALL), True, 9, max_side=100, seed=3)
    cuts = plan_cuts([(path, size)], settings, GRID).cuts
    (job,) = decoding_jobs(cuts)
    assert [cut.window.start for cut in job] == sorted(cut.window.start for cut in cuts)
    for cut, pixels in zip(job, load_cuts(job, 100, 16), strict=True):
        assert isinstance(pixels, np.ndarray)
        window = cut.window
        alone = read_clip(path, start=window.start, num_frames=window.num_frames, max_side=100, crop=window.crop)
        assert torch.equal(from_bytes(torch.from_numpy(pixels)), alone)


def test_large_jobs_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvaed_cli.media.cuts._MAX_JOB_VALUES", 2 * 3 * 9 * 32 * 32)
    sizes: dict[str, FileSize | str] = {f"{i}.mp4": FileSize(1, ClipSize(100, 50, 50)) for i in range(2)}
    made = plan(sizes, buckets=(SMALL,), num_clips=7)
    jobs = decoding_jobs(made.cuts)
    assert sorted(len(job) for job in jobs) == [1, 2, 2, 2]
    assert {cut for job in jobs for cut in job} == set(made.cuts)
    assert all(len({cut.path for cut in job}) == 1 for job in jobs)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.mp4", counting_clip(6))
    box = CropBox(0, 0, 8, 8)
    cuts = [ClipCut(0, path, 0, Window(0, 5, box)), ClipCut(1, path, 0, Window(3, 5, box))]
    good, bad = load_cuts(cuts, None, 16)
    assert isinstance(good, np.ndarray) and good.shape == (3, 5, 8, 8)
    assert isinstance(bad, str) and "ends before frame 8" in bad
    path.write_bytes(b"noise")
    assert all(isinstance(one, str) and "cannot be opened" in one for one in load_cuts(cuts, None, 16))
    assert "cannot be opened" in str(measure_file(path, None, 16))


@given(t=st.integers(1, 5), h=st.integers(1, 6), w=st.integers(1, 7), top=st.integers(0, 5), left=st.integers(0, 6))
def test_latents_are_cut_to_a_prefix_and_a_rectangle(t: int, h: int, w: int, top: int, left: int) -> None:
    latents = torch.arange(2 * 5 * 6 * 7).reshape(2, 5, 6, 7).float()
    h, w = min(h, 6 - top), min(w, 7 - left)
    part = cut_latents(latents, Window(0, t, CropBox(top, left, h, w)))
    assert part.shape == (2, t, h, w)
    expected = (
        torch.arange(t)[:, None, None] * 42 + torch.arange(top, top + h)[:, None] * 7 + torch.arange(left, left + w)
    )
    assert torch.equal(part[0], expected.float())


def test_latents_keep_their_first_frame() -> None:
    with pytest.raises(ValueError, match="shortened only at their end"):
        cut_latents(torch.zeros(1, 3, 2, 2), Window(1, 2, None))
