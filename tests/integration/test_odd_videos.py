"""Clips as people have them: every frame that goes into eval comes out, in the size that was put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.media.video import count_frames, read_clip
from tests.commands import CALIBRATION, JUDGING, invoke, read_report, succeed
from tests.toy import write_toy_clip, write_toy_vae
from tests.unit.media.media_files import color_card, write_raw


@dataclass(frozen=True)
class OddClip:
    """A file to make, and the frames, height and width that a player shows of it."""

    name: str
    make: Callable[[Path], object]
    num_frames: int
    height: int
    width: int


def raw(num_frames: int, height: int, width: int, **settings: object) -> Callable[[Path], object]:
    return lambda path: write_raw(path, color_card(num_frames, height, width), **settings)  # type: ignore[arg-type]


def figures(quality: dict[str, float | None]) -> dict[str, float]:
    """Those that were measured: LPIPS is off."""
    return {name: value for name, value in quality.items() if value is not None}


def still(path: Path) -> None:
    Image.linear_gradient("L").resize((35, 30)).convert("RGB").save(path)


ODD_CLIPS = (
    OddClip("tall.mp4", raw(5, 48, 32), 5, 48, 32),
    OddClip("turned.mp4", raw(5, 32, 48, rotation=90), 5, 48, 32),
    OddClip("odd.mkv", raw(6, 33, 41, codec="ffv1", pixel_format="yuv444p"), 6, 33, 41),
    OddClip("one.mp4", raw(1, 32, 40), 1, 32, 40),
    OddClip("two.mp4", raw(2, 32, 40), 2, 32, 40),
    OddClip("long.mp4", raw(22, 32, 40), 22, 32, 40),
    OddClip("deep.mp4", raw(5, 32, 40, pixel_format="yuv420p10le"), 5, 32, 40),
    OddClip("deep.mkv", raw(5, 32, 40, codec="ffv1", pixel_format="yuv420p10le"), 5, 32, 40),
    OddClip("loud.mp4", raw(5, 32, 40, with_audio=True), 5, 32, 40),
    OddClip("uneven.mkv", raw(5, 32, 40, times_ms=[0, 40, 200, 210, 900]), 5, 32, 40),
    OddClip("grey.mkv", raw(5, 32, 40, codec="ffv1", pixel_format="gray"), 5, 32, 40),
    OddClip("tiny.mkv", raw(5, 6, 9, codec="ffv1", pixel_format="yuv444p"), 5, 6, 9),
    OddClip("still.png", still, 1, 30, 35),
    OddClip("a name with [brackets] & ünïcode.mp4", raw(5, 32, 40), 5, 32, 40),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, a decoder cut out of it, a good clip and a damaged one."""
    folder = tmp_path_factory.mktemp("odd")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "good.mp4")
    succeed(
        f"prune vae.safetensors --ratio 0.5 --reconstruct none -o cut.safetensors --data good.mp4 {CALIBRATION}",
        cwd=folder,
    )
    whole = write_toy_clip(folder / "whole.mp4", num_frames=40).read_bytes()
    # The index stands at the front, so the file opens and its first frame decodes: the end is what is missing.
    (folder / "cut_off.mp4").write_bytes(whole[: 2 * len(whole) // 3])
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    return folder


@pytest.mark.parametrize("clip", ODD_CLIPS, ids=lambda clip: clip.name)
def test_frames_in_are_frames_out(folder: Path, tmp_path: Path, clip: OddClip) -> None:
    clip.make(tmp_path / clip.name)
    report_folder = tmp_path / "report"
    printed = succeed(
        f"eval cut.safetensors --data '{tmp_path / clip.name}' -o '{report_folder}' {JUDGING}", cwd=folder
    )
    assert printed["stderr"] == ""
    rows = read_report(report_folder)["clips"]
    assert [row["decoder"] for row in rows] == ["original", "cut"]
    for row in rows:
        assert row["clip"] == clip.name
        assert (row["num_frames"], row["height"], row["width"]) == (clip.num_frames, clip.height, clip.width)
        assert row["to_ground_truth"]["num_frames"] == clip.num_frames
    stem = Path(clip.name).stem
    video = report_folder / f"{stem}.mp4"
    assert video.exists() == (clip.num_frames > 1)
    if clip.num_frames > 1:
        assert count_frames(video) == clip.num_frames
    with Image.open(report_folder / f"{stem}.png") as sheet:
        assert min(sheet.size) > clip.height


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_no_figure(folder: Path, tmp_path: Path, chunk: int) -> None:
    write_toy_clip(tmp_path / "clip.mp4", num_frames=14)  # 1 + 3 * 4 frames and one more
    quality = []
    for name, flag in (("whole", "--chunk 100"), ("parts", f"--chunk {chunk}")):
        words = f"eval cut.safetensors --data '{tmp_path}/clip.mp4' -o '{tmp_path / name}' --no-video {flag} {JUDGING}"
        succeed(words, cwd=folder)
        report = read_report(tmp_path / name)
        assert [row["num_frames"] for row in report["clips"]] == [14, 14]
        quality += [figures(row["to_ground_truth"]) for row in report["clips"]]
    # The same frames up to float32 rounding.
    for whole, parts in zip(quality[:2], quality[2:], strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


def test_latents_give_the_frames_they_stand_for_in_either_scale(folder: Path, tmp_path: Path) -> None:
    vae = load_checkpoint(folder / "vae.safetensors", builtins={})
    with torch.no_grad():
        raw_latents = encode(vae.require_encoder(), read_clip(folder / "good.mp4")[None])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.latent_mean, vae.latent_std))
    save_file({"latents": raw_latents}, tmp_path / "raw.safetensors")
    torch.save((raw_latents - mean) / std, tmp_path / "normalized.pt")
    rows = {}
    for name, scale in (("raw.safetensors", "raw"), ("normalized.pt", "normalized")):
        words = (
            f"eval cut.safetensors --data '{tmp_path / name}' --latent-scale {scale} -o '{tmp_path / scale}' {JUDGING}"
        )
        succeed(words, cwd=folder)
        _, rows[scale] = read_report(tmp_path / scale)["clips"]
        assert (rows[scale]["num_frames"], rows[scale]["height"], rows[scale]["width"]) == (5, 32, 40)
        assert rows[scale]["to_ground_truth"] is None
        assert count_frames(tmp_path / scale / f"{Path(name).stem}.mp4") == 5
    to_original = {scale: figures(row["to_original"]) for scale, row in rows.items()}
    # (x - mean) / std and back is not exact in float32.
    assert to_original["normalized"] == pytest.approx(to_original["raw"], rel=1e-3)
    # Judged on the video, the derived decoder is as far from the original: the latents are the same.
    succeed(f"eval cut.safetensors --data good.mp4 -o '{tmp_path / 'video'}' {JUDGING}", cwd=folder)
    _, from_video = read_report(tmp_path / "video")["clips"]
    assert to_original["raw"] == pytest.approx(figures(from_video["to_original"]), rel=1e-4)


def test_an_original_alone_on_latents(folder: Path, tmp_path: Path) -> None:
    save_file({"latents": torch.randn(16, 2, 4, 5)}, tmp_path / "z.safetensors")
    succeed(f"eval vae.safetensors --data '{tmp_path / 'z.safetensors'}' -o '{tmp_path / 'r'}' {JUDGING}", cwd=folder)
    (row,) = read_report(tmp_path / "r")["clips"]
    assert row["num_frames"] == 5
    assert row["to_ground_truth"] is None and row["to_original"] is None


def test_calibration_takes_odd_clips_and_latents_together(folder: Path, tmp_path: Path) -> None:
    for clip in ODD_CLIPS[:4]:
        clip.make(tmp_path / clip.name)
    save_file({"latents": torch.randn(16, 2, 4, 5)}, tmp_path / "z.safetensors")
    words = f"analyze vae.safetensors --data '{tmp_path}' --num-calibration-clips 6 --num-frames 9 --crop-size 0"
    latency = "--latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"
    printed = succeed(f"{words} -o '{tmp_path / 'a.sft'}' {latency}", cwd=folder)
    assert printed["clips"]["num_clips"] == 6


@pytest.mark.parametrize("broken", ["cut_off.mp4", "noise.mp4", "empty.mp4", "noise.safetensors"])
def test_a_damaged_file_is_skipped_and_named(folder: Path, tmp_path: Path, broken: str) -> None:
    printed = succeed(
        f"eval cut.safetensors --data {broken} --data good.mp4 --no-video -o '{tmp_path / 'r'}' {JUDGING}", cwd=folder
    )
    assert f"Warning: skipped {broken}: " in printed["stderr"]
    report = read_report(tmp_path / "r")
    assert {row["clip"] for row in report["clips"]} == {"good.mp4"}
    assert any(note.startswith(f"skipped {broken}") for note in report["notes"])


@pytest.mark.parametrize("broken", ["cut_off.mp4", "noise.mp4", "empty.mp4"])
def test_calibration_skips_damaged_videos(folder: Path, tmp_path: Path, broken: str) -> None:
    output = tmp_path / "pruned.safetensors"
    words = f"prune vae.safetensors --ratio 0.5 --reconstruct none -o '{output}' {CALIBRATION}"
    printed = succeed(f"{words} --data {broken} --data good.mp4", cwd=folder)
    assert f"Warning: skipped {broken}: " in printed["stderr"]
    assert output.is_file()


@pytest.mark.parametrize(
    "words",
    [
        f"eval cut.safetensors -o OUTPUT {JUDGING}",
        f"prune vae.safetensors -o OUTPUT {CALIBRATION}",
        "distill cut.safetensors -o OUTPUT --num-steps 1",
    ],
    ids=lambda words: words.split()[0],
)
def test_nothing_but_damaged_files_exits_2_and_writes_nothing(folder: Path, tmp_path: Path, words: str) -> None:
    output = tmp_path / "output"
    result = invoke(f"{words.replace('OUTPUT', str(output))} --data cut_off.mp4 --data noise.mp4", cwd=folder)
    assert result.exit_code == 2
    assert "None of the 2 files can be used" in result.stderr
    assert "cut_off.mp4" in result.stderr and "noise.mp4" in result.stderr
    assert not list(tmp_path.iterdir())


def test_two_files_of_one_name_and_a_third_that_looks_numbered(folder: Path, tmp_path: Path) -> None:
    for place in ("a/clip.mp4", "b/clip.mp4", "c/clip-2.mp4"):
        (tmp_path / place).parent.mkdir()
        write_toy_clip(tmp_path / place, num_frames=2)
    succeed(f"eval cut.safetensors --data '{tmp_path}' -o '{tmp_path / 'r'}' {JUDGING}", cwd=folder)
    assert len(list((tmp_path / "r").glob("*.mp4"))) == 3
    assert len(read_report(tmp_path / "r")["files"]) == 6


@pytest.mark.parametrize("name", ["original", "video"])
def test_a_decoder_may_have_any_name(folder: Path, tmp_path: Path, name: str) -> None:
    decoder = tmp_path / f"{name}.safetensors"
    decoder.write_bytes((folder / "cut.safetensors").read_bytes())
    words = f"eval '{decoder}' --original vae.safetensors --data good.mp4 -o '{tmp_path / 'r'}' --no-video {JUDGING}"
    succeed(words, cwd=folder)
    report = read_report(tmp_path / "r")
    assert [one["name"] for one in report["decoders"]] == ["original", "original, exact", f"{name}-2"]
    assert report["decoders"][2]["num_parameters"] < report["decoders"][0]["num_parameters"]
    assert report["decoders"][2]["to_ground_truth"]["psnr_db"] < 60  # not the video compared with itself
