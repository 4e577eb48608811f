from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.decoders.variants.exact import exact_coder
from flashvaed_cli.errors import ArtifactError, MediaError
from flashvaed_cli.media import latent_cache
from flashvaed_cli.media.cuts import ClipSize, LatentGrid
from flashvaed_cli.media.video import read_clip
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.stages.common.fitted_clips import frames_taken
from flashvaed_cli.stages.common.loading import Inputs, load_inputs
from flashvaed_cli.stages.distill import clip_source
from flashvaed_cli.stages.distill.data import LatentPool, TrainingData, training_data
from tests.toy import write_toy_clip, write_toy_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    path = write_toy_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")
    return load_inputs(str(path), original=None, family=None, device=CPU, progress=SilentProgress())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_toy_clip(folder / "long.mp4", 14, 32, 48)
    write_toy_clip(folder / "short.mp4", 6, 40, 32)
    return folder


def settings(*data: Path, **changes: object) -> DistillRecipe:
    plain = {"num_frames": 5, "crop_size": 16, "num_clips": 6, "num_workers": 0}
    return DistillRecipe.model_validate({"data": tuple(map(str, data)), **plain, **changes})


def without_encoder(inputs: Inputs) -> Inputs:
    return replace(inputs, original=replace(inputs.original, encoder=None))


def draws(data: TrainingData, num_steps: int = 4) -> list[Tensor]:
    draw = data.draw(batch_size=2, seed=0)
    return [draw(step)[0] for step in range(num_steps)]


def assert_same_draws(one: TrainingData, other: TrainingData) -> None:
    assert one.key == other.key
    for first, second in zip(draws(one), draws(other), strict=True):
        assert torch.equal(first, second)


# --- drawing --------------------------------------------------------------------------------------------------


def coordinates(number: int, size: ClipSize) -> Tensor:
    """A clip of which every value tells where it was: number, frame, row, column."""
    axes = [torch.arange(n) for n in (size.num_frames, size.height, size.width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([torch.full_like(grid[:1], number), grid]).float()


def made_up(groups: dict[ClipSize, int], stored: ClipSize) -> TrainingData:
    sizes = [size for size, count in groups.items() for _ in range(count)]
    pool = LatentPool({number: coordinates(number, stored) for number in range(len(sizes))})
    numbers = {size: tuple(n for n, one in enumerate(sizes) if one == size) for size in groups}
    return TrainingData(pool, numbers, "key", (), {}, len(sizes), 0, None, CPU)


MADE_UP = made_up({ClipSize(2, 3, 4): 9, ClipSize(3, 2, 2): 2}, ClipSize(3, 5, 6))


@given(
    batch_size=st.integers(1, 3),
    num_micro_batches=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
    step=st.integers(0, 99),
)
def test_a_step_is_the_same_however_it_is_split(
    batch_size: int, num_micro_batches: int, num_ranks: int, seed: int, step: int
) -> None:
    (whole,) = MADE_UP.draw(batch_size=batch_size * num_micro_batches * num_ranks, seed=seed)(step)
    parts = []
    for rank in range(num_ranks):
        draw = MADE_UP.draw(
            batch_size=batch_size, num_micro_batches=num_micro_batches, seed=seed, rank=rank, num_ranks=num_ranks
        )
        draw(step + 1)  # what was drawn before plays no part
        batches = draw(step)
        assert [len(batch) for batch in batches] == [batch_size] * num_micro_batches
        parts.append(batches)
    joined = [parts[rank][m] for m in range(num_micro_batches) for rank in range(num_ranks)]
    assert torch.equal(torch.cat(joined), whole)


@given(seed=st.integers(0, 99), step=st.integers(0, 99))
def test_every_clip_is_a_prefix_and_a_rectangle(seed: int, step: int) -> None:
    (batch,) = MADE_UP.draw(batch_size=5, seed=seed)(step)
    size = ClipSize(*batch.shape[2:])
    assert size in MADE_UP.groups
    for one in batch:
        number, top, left = (int(one[axis, 0, 0, 0]) for axis in (0, 2, 3))
        assert number in MADE_UP.groups[size]
        assert one[1, 0, 0, 0] == 0  # it begins with the clip's first latent
        assert torch.equal(one, MADE_UP.latents.cut(number, size, top, left))


def test_draws_reach_every_place_and_repeat_no_clip_in_a_batch() -> None:
    draw = MADE_UP.draw(batch_size=9, seed=0)
    tops, lefts, sizes = set(), set(), []
    for step in range(80):
        (batch,) = draw(step)
        sizes.append(ClipSize(*batch.shape[2:]))
        if sizes[-1] == ClipSize(2, 3, 4):
            assert len(set(batch[:, 0, 0, 0, 0].tolist())) == 9
            tops |= set(batch[:, 2, 0, 0, 0].tolist())
            lefts |= set(batch[:, 3, 0, 0, 0].tolist())
    assert tops == lefts == {0, 1, 2}
    assert 50 < sizes.count(ClipSize(2, 3, 4)) < 78  # 9 of 11 clips


def test_first_clips() -> None:
    assert [tuple(one.shape[2:]) for one in MADE_UP.first(10)] == [(2, 3, 4)] * 9 + [(3, 2, 2)]
    assert len(MADE_UP.first(3)) == 3


# --- from videos ----------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_window(inputs: Inputs, videos: Path) -> None:
    """The first latent of a clip is a true first latent: its window is cut before it is encoded."""
    recipe = settings(videos / "long.mp4", num_frames=7, crop_size=0, num_clips=3)
    data = training_data(recipe, inputs, SilentProgress())
    assert data.groups == {ClipSize(2, 4, 6): (0, 1, 2)}
    windows = [read_clip(videos / "long.mp4", start=start, num_frames=5)[None] for start in range(10)]
    with torch.no_grad():
        possible = [encode(exact_coder(inputs.original.require_encoder()), window)[0] for window in windows]
    for clip in data.first(3):
        assert any(torch.equal(clip[0], one) for one in possible)


def test_small_videos_give_small_clips_unless_buckets_are_given(inputs: Inputs, videos: Path) -> None:
    plain = training_data(settings(videos, num_frames=9, crop_size=48), inputs, SilentProgress())
    assert {str(size): len(numbers) for size, numbers in plain.groups.items()} == {"3x4x6": 3, "2x5x4": 2}
    progress = SilentProgress()
    data = training_data(settings(videos, buckets=("9x32x32", "5x16x16", "1x40x32")), inputs, progress)
    assert set(map(str, data.groups)) == {"3x4x4", "2x2x2", "1x5x4"}
    assert progress.warnings == []
    data = training_data(settings(videos, buckets=[[9, 32, 32]]), inputs, progress)
    assert set(map(str, data.groups)) == {"3x4x4"}
    (warning,) = progress.warnings
    assert "short.mp4: too short or too small for every bucket (9x32x32): 6x40x32" in warning
    assert data.record()["num_skipped"] == 1


def test_buckets_that_the_vae_does_not_take(inputs: Inputs, videos: Path) -> None:
    for bucket, near in {"6x16x16": "5x16x16", "5x20x16": "5x16x16", "3x4x9": "1x8x8"}.items():
        with pytest.raises(MediaError, match=rf"bucket {bucket} does not fit.*give {near}, say"):
            training_data(settings(videos, buckets=(bucket,)), inputs, SilentProgress())
    with pytest.raises(MediaError, match=r"None of the 2 files can be used.*too short or too small"):
        training_data(settings(videos, buckets=("5x64x64",)), inputs, SilentProgress())


def test_broken_videos_are_skipped_counted_and_named(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    whole = write_toy_clip(tmp_path / "whole.mp4", 30, 32, 32).read_bytes()
    (tmp_path / "cut_off.mp4").write_bytes(whole[: 2 * len(whole) // 3])
    (tmp_path / "list.txt").write_text(f"noise.mp4\ncut_off.mp4\ngone.mp4\n{videos}/long.mp4\n")
    progress = SilentProgress()
    data = training_data(settings(tmp_path / "list.txt"), inputs, progress)
    record = data.record()
    assert record["num_clips"] == record["num_encoded"] == 6
    assert record["num_skipped"] == 3
    assert {Path(path).name for path in record["skipped"]} == {"noise.mp4", "cut_off.mp4", "gone.mp4"}
    assert sum(warning.startswith("skipped ") for warning in progress.warnings) == 3
    with pytest.raises(MediaError, match=r"None of the 2 files can be used: .*(noise|cut_off)\.mp4.*; .*\.mp4"):
        training_data(settings(tmp_path / "noise.mp4", tmp_path / "cut_off.mp4"), inputs, SilentProgress())


def test_damage_behind_what_measuring_sees(inputs: Inputs, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = clip_source.load_cuts

    def fail_for_short(cuts: tuple, max_side: int | None, latent_width: int) -> list:
        loaded = load(cuts, max_side, latent_width)
        return [f"{cuts[0].path} is damaged"] * len(cuts) if cuts[0].path.name == "short.mp4" else loaded

    monkeypatch.setattr(clip_source, "load_cuts", fail_for_short)
    data = training_data(settings(videos), inputs, SilentProgress())
    ((path, reason),) = data.record()["skipped"].items()
    assert path.endswith("short.mp4") and reason.startswith("3 of its clips: ") and reason.endswith("is damaged")
    assert data.record()["num_clips"] == 3
    with pytest.raises(MediaError, match=r"The only file cannot be used: .*is damaged"):
        training_data(settings(videos / "short.mp4"), inputs, SilentProgress())


def test_only_as_many_clips_as_are_drawn(inputs: Inputs, videos: Path) -> None:
    recipe = settings(videos, num_clips=64, num_steps=2)
    assert training_data(recipe, inputs, SilentProgress(), num_drawn=10).record()["num_encoded"] == 10
    assert training_data(recipe, inputs, SilentProgress()).record()["num_encoded"] <= 12


def test_latents_without_video_and_without_encoder(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    raw = torch.randn(2, 16, 4, 6, 7)
    save_file({"latents": raw}, tmp_path / "z.safetensors")
    recipe = settings(tmp_path / "z.safetensors", latent_scale="raw", num_frames=9)
    data = training_data(recipe, without_encoder(inputs), SilentProgress())
    assert set(map(str, data.groups)) == {"3x2x2"}
    for clip in data.first(6):
        windows = raw[:, :, :3].unfold(3, 2, 1).unfold(4, 2, 1)  # [B, C, T, top, left, 2, 2]
        assert (windows == clip[:, :, :, None, None]).all(dim=(1, 2, 5, 6)).any()
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (inputs.original.latent_mean, inputs.original.latent_std)
    )
    save_file({"latents": (raw - mean) / std}, tmp_path / "z.safetensors")
    same = training_data(recipe.model_copy(update={"latent_scale": "normalized"}), inputs, SilentProgress())
    for one, other in zip(draws(data), draws(same), strict=True):
        torch.testing.assert_close(one, other)  # (x - mean) / std and back is not exact in float32
    mixed = training_data(settings(tmp_path / "z.safetensors", videos), inputs, SilentProgress())
    assert len(mixed.groups[ClipSize(2, 2, 2)]) == mixed.record()["num_clips"] == 6
    with pytest.raises(ArtifactError, match="no encoder"):
        training_data(settings(videos), without_encoder(inputs), SilentProgress())


# --- the cache ------------------------------------------------------------------------------------------------


def test_a_cache_gives_the_same_clips_without_the_encoder(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    recipe = settings(videos, cache_latents=str(tmp_path / "cache"))
    plain = training_data(settings(videos), inputs, SilentProgress())
    written = training_data(recipe, inputs, SilentProgress())
    reused = training_data(recipe, without_encoder(inputs), SilentProgress())
    assert_same_draws(plain, written)
    assert_same_draws(plain, reused)
    assert [one.record()["num_encoded"] for one in (plain, written, reused)] == [6, 6, 0]
    assert reused.record()["cache"] == str(tmp_path / "cache")


def test_smaller_clips_come_from_the_same_cache(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    cache = {"cache_latents": str(tmp_path / "cache")}
    large = training_data(settings(videos, buckets=("9x32x32", "5x40x32"), **cache), inputs, SilentProgress())
    assert set(map(str, large.groups)) == {"3x4x4", "2x5x4"}
    small = settings(videos, buckets=("5x16x24", "1x40x16"), num_clips=4, **cache)
    data = training_data(small, without_encoder(inputs), SilentProgress())
    assert set(map(str, data.groups)) == {"2x2x3", "1x5x2"}
    assert set(data.latents.sizes) > set(data.groups[ClipSize(2, 2, 3)]) <= {0, 1, 2, 3}
    assert data.key != large.key
    for batch in draws(data):
        assert ClipSize(*batch.shape[2:]) in data.groups
    with pytest.raises(MediaError, match="none covers 13x32x32"):
        training_data(settings(videos, buckets=("13x32x32",), **cache), inputs, SilentProgress())


def test_an_interrupted_cache_goes_on(
    inputs: Inputs, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_CLIPS", 2)
    recipe = settings(videos, cache_latents=str(tmp_path / "cache"))
    real_encode, calls = clip_source.encode_clip, []

    def stop_after_three(*arguments: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clip_source, "encode_clip", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        training_data(recipe, inputs, SilentProgress())
    assert not (tmp_path / "cache/index.json").exists()
    data = training_data(recipe, inputs, SilentProgress())
    assert data.record()["num_encoded"] == 3
    assert len(calls) == 4 + 3
    assert_same_draws(data, training_data(settings(videos), inputs, SilentProgress()))


def test_a_damaged_shard_is_made_anew(
    inputs: Inputs, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_CLIPS", 2)
    recipe = settings(videos, cache_latents=str(tmp_path / "cache"))
    written = training_data(recipe, inputs, SilentProgress())
    shard = tmp_path / "cache/shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 64
    shard.write_bytes(content)
    progress = SilentProgress()
    mended = training_data(recipe, inputs, progress)
    assert ["shard-00001.safetensors is damaged" in warning for warning in progress.warnings] == [True]
    assert mended.record()["num_encoded"] == 2
    assert_same_draws(written, mended)


def test_a_damaged_index_encodes_nothing_again(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    recipe = settings(videos, cache_latents=str(tmp_path / "cache"))
    written = training_data(recipe, inputs, SilentProgress())
    index = tmp_path / "cache/index.json"
    index.write_bytes(index.read_bytes()[:-100])
    progress = SilentProgress()
    mended = training_data(recipe, without_encoder(inputs), progress)
    assert ["index.json is damaged" in warning for warning in progress.warnings] == [True]
    assert mended.record()["num_encoded"] == 0
    assert_same_draws(written, mended)
    assert training_data(recipe, without_encoder(inputs), silent := SilentProgress()) and silent.warnings == []


def test_changed_data_is_refused(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes((videos / "long.mp4").read_bytes())
    recipe = settings(video, cache_latents=str(tmp_path / "cache"))
    training_data(recipe, inputs, SilentProgress())
    video.write_bytes((videos / "short.mp4").read_bytes())
    with pytest.raises(MediaError, match=r"caches other latents: 1 data file changed since \(.*a\.mp4\)"):
        training_data(recipe, inputs, SilentProgress())


def test_other_processes_wait_for_the_main_one(inputs: Inputs, videos: Path, tmp_path: Path) -> None:
    recipe = settings(videos, cache_latents=str(tmp_path / "cache"))
    made: list[TrainingData] = []

    def wait_for(action: Callable[[], object]) -> Callable[[], None]:
        return lambda: made.append(action())  # type: ignore[arg-type]

    main = wait_for(lambda: training_data(recipe, inputs, SilentProgress()))
    other = training_data(recipe, without_encoder(inputs), SilentProgress(), is_main=False, wait=main)
    assert_same_draws(made[0], other)
    waited: list[int] = []
    refused = recipe.model_copy(update={"seed": 1})
    with pytest.raises(MediaError, match="seed 0 instead of 1"):
        training_data(refused, inputs, SilentProgress(), wait=lambda: waited.append(1))
    assert waited == [1]  # an error does not leave the others waiting
    absent = recipe.model_copy(update={"cache_latents": str(tmp_path / "elsewhere")})
    with pytest.raises(MediaError, match="every machine must see the same folder"):
        training_data(absent, inputs, SilentProgress(), is_main=False)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (LatentGrid(4, 8), "1 + 4 n frames"),
        (LatentGrid(4, 16, 5), "1 + 4 n frames, 17 at most as one clip"),
        (LatentGrid(1, 8), "any number of frames"),
        (LatentGrid(1, 8, 14), "any number of frames, 14 at most as one clip"),
    ],
)
def test_the_numbers_of_frames_are_said_in_words(grid: LatentGrid, words: str) -> None:
    assert frames_taken(grid) == words
