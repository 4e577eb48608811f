"""Mistakes against real stages: exit code 2, one message that says what and what to do, and no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.store import read_artifact, write_artifact
from tests.commands import CALIBRATION, JUDGING, TRAINING, invoke, strict_json, succeed
from tests.toy import write_toy_clip, write_toy_vae

PRUNE = f"prune vae.safetensors --ratio 0.5 --reconstruct none --data clip.mp4 {CALIBRATION}"
DISTILL = f"distill --num-steps 1 --data clip.mp4 {TRAINING}"
CONVERT = f"convert-ops --reconstruct none --data clip.mp4 {CALIBRATION}"
LATENCY = "--latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of every kind, right and wrong."""
    folder = tmp_path_factory.mktemp("inputs")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_vae(folder / "other_vae.safetensors", seed=1)
    write_toy_clip(folder / "clip.mp4")
    succeed(f"{PRUNE} -o cut.safetensors", cwd=folder)
    succeed(f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} {LATENCY} -o study.safetensors", cwd=folder)
    save_file({"decoder.mid.block_1.conv1.conv.weight": torch.zeros(8, 8, 3, 3, 3)}, folder / "hunyuan.safetensors")
    save_file({"some.weight": torch.zeros(3)}, folder / "unknown.safetensors")
    save_file({"latents": torch.randn(4, 2, 4, 5)}, folder / "narrow.safetensors")
    header, broken = read_artifact(folder / "vae.safetensors")
    broken["decoder.stages.up2.0.conv1.weight"][0] = float("nan")
    write_artifact(folder / "broken_vae.safetensors", broken, header)
    whole = (folder / "vae.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "config.json").write_text('{"dim": 96}', encoding="utf-8")
    (folder / "graph.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" * 20)
    (folder / "text.safetensors").write_text("not tensors", encoding="utf-8")
    (folder / "others.xml").write_text("<testsuites/>", encoding="utf-8")
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text("precious", encoding="utf-8")
    (folder / "typo.yaml").write_text("prune: {keep_ration: 0.5, round_to: none}\n", encoding="utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = {
    "missing file": ("prune vae.safetensor", ["vae.safetensor: no such file", "Near it: vae.safetensors", "builtin:"]),
    "missing builtin": ("analyze builtin:huge", ["builtin:huge: no such builtin", "builtin:tiny-wan"]),
    "another family": ("prune hunyuan.safetensors", ["looks like a HunyuanVideo VAE", "families wan2.1, wan2.2"]),
    "unknown tensors": ("prune unknown.safetensors", ["not a checkpoint that this version knows", "some.weight"]),
    "a video as VAE": ("prune clip.mp4", ["clip.mp4: a video (MP4), not a safetensors file"]),
    "a config as VAE": ("prune config.json", ["config.json: a JSON file, not a safetensors file"]),
    "a graph as VAE": ("prune graph.onnx", ["graph.onnx: an ONNX graph"]),
    "truncated": ("prune truncated.safetensors", ["truncated", "Copy or download it again"]),
    "text": ("prune text.safetensors", ["not a safetensors file, or truncated"]),
    "analysis as decoder": ("prune study.safetensors", ["an analysis (statistics), not a decoder", "--analysis"]),
    "decoder as analysis": (f"{PRUNE} --analysis cut.safetensors", ["is a decoder, not an analysis"]),
    "analysis of another": (
        "prune other_vae.safetensors --analysis study.safetensors --data clip.mp4",
        ["is the analysis of vae.safetensors", "flashvaed analyze other_vae.safetensors"],
    ),
    "missing analysis": (f"{PRUNE} --analysis nowhere.safetensors", ["nowhere.safetensors: no such file"]),
    "ratio of zero": ("prune --ratio 0", ["--ratio = 0", "greater than 0"]),
    "ratio that keeps nothing": (f"{PRUNE} --ratio up3=0.1", ["ratio 0.1 keeps none of 4 channels", "at least 0.25"]),
    "ratio that keeps all": ("prune vae.safetensors --ratio 1 --data clip.mp4", ["nothing to prune"]),
    "unknown stage": (f"{PRUNE} --ratio upp3=0.5", ["no stage 'upp3'", "up0, up1, up2, up3"]),
    "unknown group": (f"{PRUNE} --ratio up3.strem=0.5", ["no channel group 'up3.strem'", "up3.stream, up3.0.inner"]),
    "weights that are not finite": (
        "prune broken_vae.safetensors --data clip.mp4",
        ["broken_vae.safetensors: up2.0.conv1.weight of the decoder holds NaN"],
    ),
    "unknown key in recipe": (
        "prune --recipe typo.yaml", ["2 mistakes", "keep_ration", "did you mean keep_ratio", "round_to"]
    ),
    "unknown recipe": ("prune --recipe demmo", ["no such file", "shipped: demo"]),
    "unknown step": ("distill --recipe paper --step phase4", ["phase4", "phase1, phase2, phase3"]),
    "missing data": ("prune vae.safetensors --data nowhere.mp4", ["nowhere.mp4 does not exist"]),
    "data of no kind": ("prune vae.safetensors --data notes", ["notes holds no clip", ".mp4"]),
    "data of a wrong kind": ("prune vae.safetensors --data config.json", ["config.json is not of an accepted kind"]),
    "a text that lists no data": (
        "prune vae.safetensors --data notes/diary.txt", ["diary.txt, line 1: ", "precious does not exist"]
    ),
    "latents of another VAE": (f"eval cut.safetensors --data narrow.safetensors {JUDGING}", ["16 latent channels"]),
    "a VAE as data": ("prune vae.safetensors --data other_vae.safetensors", ["Is it a checkpoint?"]),
    "wrong original": (
        f"eval cut.safetensors --original other_vae.safetensors --data clip.mp4 {JUDGING}",
        ["is not the original of cut.safetensors", "SHA-256", "--original"],
    ),
    "decoders of two originals": (
        f"eval cut.safetensors --compare other_vae.safetensors --data clip.mp4 {JUDGING}",
        ["only decoders of one original can be compared"],
    ),
    "LPIPS without weights": ("eval cut.safetensors --lpips on --data clip.mp4", ["LPIPS", "--allow-download"]),
    "unknown stage to convert": (f"{CONVERT} vae.safetensors --operator middle=frame2d", ["no stage 'middle'"]),
    "stage without blocks": (f"{CONVERT} vae.safetensors --operator head=frame2d", ["has nothing to convert"]),
    "phase that does not fit": (f"{DISTILL} cut.safetensors --phase 1", ["run convert-ops first"]),
    "dtype that does not train": (f"{DISTILL} cut.safetensors --dtype float16", ["does not train", "bfloat16"]),
    "output is a folder": (f"{PRUNE} -o notes", ["notes is a folder"]),
    "output is a file of others": (f"{PRUNE} -o clip.mp4", ["was not written by flashvaed", "--force"]),
    "report among other files": ("eval cut.safetensors -o notes", ["notes holds other files", "--force"]),
    "condition on a decoder that is not there": (
        f"eval cut.safetensors --data clip.mp4 {JUDGING} --require mild:psnr_db>=1 -o conditions",
        ["no decoder mild; there are 'original'; 'cut'; 'original, exact'"],
    ),
    "condition with --speed": ("eval cut.safetensors --speed --require ssim>=1", ["--require: not with --speed"]),
    "JUnit over an artifact": ("eval cut.safetensors --junit vae.safetensors", ["--junit = 'vae.safetensors'", ".xml"]),
    "JUnit over a file of others": (
        "eval cut.safetensors --data clip.mp4 --junit others.xml", ["others.xml exists and was not written by"]
    ),
    "report into a file": ("eval cut.safetensors -o clip.mp4", ["clip.mp4 is a file"]),
    "report below a file": ("eval cut.safetensors -o clip.mp4/report", ["clip.mp4 is a file"]),
    "export among other files": ("export cut.safetensors -o notes", ["notes holds other files", "--force"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_2(
    folder: Path, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no LPIPS weights, whatever this machine has
    words, parts = MISTAKES[mistake]
    before = files(folder)
    result = invoke(f"{words} --quiet", cwd=folder)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    error = result.stderr[result.stderr.index("Error: ") :]
    assert error.count("Error: ") == 1 and "Traceback" not in error
    for part in parts:
        assert part in error
    assert files(folder) == before


def test_an_original_that_moved_is_asked_for_and_found(folder: Path, tmp_path: Path) -> None:
    for name in ("cut.safetensors", "clip.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    words = f"eval cut.safetensors --data clip.mp4 --no-video {JUDGING}"
    result = invoke(words, cwd=tmp_path)
    assert result.exit_code == 2
    assert "the original of cut.safetensors" in result.stderr and "--original" in result.stderr
    place = f"'{folder / 'vae.safetensors'}'"
    succeed(f"{words} --original {place}", cwd=tmp_path)
    # It also serves the decoders to compare with.
    (tmp_path / "more.safetensors").write_bytes((folder / "cut.safetensors").read_bytes())
    succeed(f"{words} --original {place} --compare more.safetensors --force", cwd=tmp_path)
    # Beside the decoder it needs no naming.
    (tmp_path / "vae.safetensors").write_bytes((folder / "vae.safetensors").read_bytes())
    succeed(f"{words} --force", cwd=tmp_path)


def test_an_export_finds_the_encoder_of_an_original_that_moved(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes())
    words = "export cut.safetensors -t diffusers"
    (alone,) = succeed(words, cwd=tmp_path)["notes"]
    assert "it decodes only" in alone and "--original" in alone
    (named,) = succeed(f"{words} --original '{folder / 'vae.safetensors'}' --force", cwd=tmp_path)["notes"]
    assert "encoder included" in named
    wrong = invoke(f"{words} --original '{folder / 'other_vae.safetensors'}' --force", cwd=tmp_path)
    assert wrong.exit_code == 2
    assert "is not the original of cut.safetensors" in " ".join(wrong.stderr.split())


def test_an_analysis_of_another_decoder_in_the_folder_is_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "analysis.safetensors").write_bytes((folder / "study.safetensors").read_bytes())
    for name in ("other_vae.safetensors", "clip.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    words = f"prune other_vae.safetensors --ratio 0.5 --reconstruct none --data clip.mp4 {CALIBRATION}"
    result = invoke(words, cwd=tmp_path)
    assert result.exit_code == 0
    assert "analysis.safetensors is of another decoder: measuring again" in result.stderr


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (f"{PRUNE} -o OUT", "mine.safetensors"),
        (f"{CONVERT} vae.safetensors -o OUT", "mine.safetensors"),
        (f"{DISTILL} cut.safetensors --phase 3 -o OUT", "mine.safetensors"),
        (f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} {LATENCY} -o OUT", "mine.safetensors"),
        ("export cut.safetensors --target safetensors -o OUT", "mine/notes.txt"),
        (f"eval cut.safetensors --data clip.mp4 {JUDGING} -o OUT", "mine/notes.txt"),
    ],
    ids=lambda value: value.split()[0],
)
def test_files_of_others_are_replaced_with_force_only(folder: Path, tmp_path: Path, words: str, target: str) -> None:
    mine = tmp_path / target
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine", encoding="utf-8")
    words = words.replace("OUT", f"'{tmp_path / Path(target).parts[0]}'")
    assert invoke(words, cwd=folder).exit_code == 2
    assert mine.read_text(encoding="utf-8") == "mine"
    succeed(f"{words} --force", cwd=folder)
    # A folder is written into; what else lies there stays.
    assert (mine.read_bytes() == b"mine") == target.endswith(".txt")
    succeed(words, cwd=folder)  # over its own result it needs no force


def test_stdout_holds_the_result_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    words = f"{PRUNE} --data notes/../clip.mp4 -o '{tmp_path / 'p.safetensors'}'"
    printed = invoke(f"{words} --json", cwd=folder)
    assert strict_json(printed.stdout)["paths"] == [str(tmp_path / "p.safetensors")]
    assert "covariances" in printed.stderr
    quiet = invoke(f"{words} --quiet --force", cwd=folder)
    assert quiet.stderr == ""
    assert "PSNR to the original" in quiet.stdout and "wrote " in quiet.stdout and "conv1" not in quiet.stdout
    assert quiet.stdout.rstrip().endswith("flashvaed eval " + str(tmp_path / "p.safetensors") + " --data held-out/")
    assert "up2.0.inner" in invoke(f"{words} --quiet --verbose --force", cwd=folder).stdout
    both = invoke(f"{words} --quiet --json --force", cwd=folder)
    assert both.stderr == ""
    one, other = (strict_json(run.stdout) for run in (printed, both))
    assert one.keys() == other.keys() and one["selection"] == other["selection"]


def test_training_in_bfloat16_takes_a_pruned_decoder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "flash.safetensors"
    printed = succeed(f"{DISTILL} cut.safetensors --phase 3 --dtype bfloat16 -o '{output}'", cwd=folder)
    assert printed["phases"][0]["num_steps"] == 1 and output.is_file()


def test_channels_that_do_not_vary_are_named(folder: Path, tmp_path: Path) -> None:
    header, tensors = read_artifact(folder / "vae.safetensors")
    tensors["decoder.stages.up2.1.conv1.weight"][[1, 4]] = 0.0
    tensors["decoder.stages.up2.1.conv1.bias"][[1, 4]] = torch.tensor([0.0, 2.0])
    write_artifact(tmp_path / "still.safetensors", tensors, header)
    (tmp_path / "clip.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    words = f"prune still.safetensors --ratio up2.1.inner=0.75 --rule l1 --data clip.mp4 {CALIBRATION}"
    printed = succeed(f"{words} --reconstruct none", cwd=tmp_path)
    assert "do not vary" in printed["stderr"]
    assert "up2.1.inner: 1 dead (1); up2.1.inner: 1 constant (4)" in printed["stderr"]
    (selection,) = printed["selection"]
    assert (selection["kept"], selection["dead"], selection["constant"]) == ([0, 2, 3, 5, 6, 7], [1], [4])
