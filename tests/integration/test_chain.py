"""The six commands in a row on a small decoder: files, lineage, specs, figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.store import content_sha256, read_artifact, read_header
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.media.video import count_frames
from tests.commands import CALIBRATION, JUDGING, TRAINING, read_report, strict_json, succeed
from tests.toy import BASE_WIDTH, HEIGHT, NUM_FRAMES, WIDTH, write_toy_clip, write_toy_vae

STEPS = {
    "analyze": f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} --latency-frames 5 --latency-side 32 "
    "--num-latency-rounds 1 --width-latency-s 0 --plots",
    "prune": f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION}",
    "convert-ops": f"convert-ops --data clip.mp4 {CALIBRATION} --num-separable-iterations 1",
    "distill": f"distill --num-steps 4 --data clip.mp4 {TRAINING}",
    "eval": f"eval --data clip.mp4 {JUDGING} --compare pruned.safetensors",
}
ARTIFACTS = ("pruned.safetensors", "converted.safetensors", "flash.safetensors")


class Chain:
    """A folder in which the commands ran one after the other, and what each printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_toy_vae(folder / "vae.safetensors")
        write_toy_clip(folder / "clip.mp4")
        self.printed = {command: succeed(words, cwd=folder) for command, words in STEPS.items()}

    def header(self, name: str) -> ArtifactHeader:
        return read_header(self.folder / name)

    def spec(self, name: str) -> DecoderSpec:
        spec = self.header(name).decoder
        assert spec is not None
        return spec

    def sha256(self, name: str) -> str:
        return content_sha256(self.folder / name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.manual_seed(0)
    return Chain(tmp_path_factory.mktemp("chain"))


def operators(spec: DecoderSpec, stage: str) -> set[str]:
    return {layer.operator for address, layer in spec.layers() if address.startswith(f"{stage}.") and "conv" in address}


def width(spec: DecoderSpec, address: str) -> int:
    return dict(spec.layers())[address].out_width


def test_every_command_writes_what_it_says(chain: Chain) -> None:
    for printed in chain.printed.values():
        assert printed["paths"]
        assert all((chain.folder / path).is_file() for path in printed["paths"])
    made = {path.name for path in chain.folder.iterdir()}
    plots = {f"analysis.{kind}.png" for kind in ("r2", "spectra", "latency")}
    assert made == {
        *ARTIFACTS, *plots, "analysis.safetensors", "flash.losses.png", "flash.log.jsonl", "report",
        "vae.safetensors", "clip.mp4",
    }  # fmt: skip


def test_lineage_goes_back_to_the_one_original(chain: Chain) -> None:
    for name in (*ARTIFACTS, "analysis.safetensors"):
        original = chain.header(name).original
        assert original is not None
        assert (original.role, original.location) == ("original", "vae.safetensors")
        assert original.sha256 == chain.sha256("vae.safetensors")
    parents = {name: [(p.role, p.location) for p in chain.header(name).parents] for name in ARTIFACTS}
    assert parents == {
        "pruned.safetensors": [("decoder", "vae.safetensors"), ("analysis", "analysis.safetensors")],
        "converted.safetensors": [("decoder", "pruned.safetensors")],
        "flash.safetensors": [("decoder", "converted.safetensors")],
    }
    for name in ARTIFACTS:
        assert all(parent.sha256 == chain.sha256(parent.location) for parent in chain.header(name).parents)


def test_headers_tell_how_to_make_them_again(chain: Chain) -> None:
    pruned = chain.header("pruned.safetensors")
    assert pruned.command_line.startswith("flashvaed prune vae.safetensors --ratio 0.5 --data clip.mp4")
    assert (pruned.recipe["keep_ratio"], pruned.recipe["crop_size"], pruned.seed) == (0.5, 32, 0)
    assert pruned.latent_mean == chain.header("vae.safetensors").latent_mean
    assert chain.header("flash.safetensors").recipe["num_steps"] == 4


def test_the_analysis_measures_every_stage_and_group(chain: Chain) -> None:
    printed = chain.printed["analyze"]
    stages = {record["stage"]: record for record in printed["stages"]}
    assert list(stages) == [stage.name for stage in chain.spec("vae.safetensors").stages]
    for record in stages.values():
        assert record["parameters"] > 0 and record["gflop"] > 0
        assert sum(record["latency_ms"].values()) > 0
    assert sum(record["parameters"] for record in stages.values()) == chain.printed["prune"]["parameters_before"]
    for record in printed["groups"]:
        assert sorted(record["order"]) == list(range(record["width"]))
        # All channels explain all; the greedy curve never falls (1e-9: float64 rounding).
        assert record["r2"][-1] == pytest.approx(1.0, abs=1e-6)
        assert np.all(np.diff(record["r2"]) >= -1e-9)
    _, tensors = read_artifact(chain.folder / "analysis.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"covariance", "mean"}


def test_pruning_halves_the_shallow_stages_only(chain: Chain) -> None:
    before, after = chain.spec("vae.safetensors"), chain.spec("pruned.safetensors")
    for address in ("up2.0.conv1", "up2.2.conv2", "up3.0.conv1", "up3.2.conv2"):
        assert width(after, address) == width(before, address) // 2
    for stage in ("post_quant", "conv_in", "mid", "up0"):
        assert after.stage(stage) == before.stage(stage)


def test_kept_channels_are_handed_on(chain: Chain) -> None:
    kept = chain.header("pruned.safetensors").kept_channels
    assert {address.split(".")[0] for address in kept} == {"up1", "up2", "up3"}  # up1.3 puts up2's stream out
    selected = {record["group"]: record["kept"] for record in chain.printed["prune"]["selection"]}
    assert list(kept["up2.0"]) == selected["up2.stream"]
    for channels in kept.values():
        assert list(channels) == sorted(set(channels))
        assert max(channels) < 2 * BASE_WIDTH
    assert chain.header("converted.safetensors").kept_channels == kept
    assert "which channels were kept" not in chain.printed["convert-ops"]["stderr"]
    assert chain.header("flash.safetensors").kept_channels == kept


def test_conversion_changes_operators_and_no_width(chain: Chain) -> None:
    before, after = chain.spec("pruned.safetensors"), chain.spec("converted.safetensors")
    assert operators(after, "mid") == operators(after, "up0") == operators(after, "up1") == {"dwsep3d"}
    assert operators(after, "up2") == operators(after, "up3") == {"frame2d"}
    assert [(a, layer.in_width, layer.out_width) for a, layer in before.layers()] == [
        (a, layer.in_width, layer.out_width) for a, layer in after.layers()
    ]
    assert chain.spec("flash.safetensors") == after
    specs = [chain.spec(name) for name in ("vae.safetensors", "pruned.safetensors", "converted.safetensors")]
    costs = [total_gflop(spec, (2, 4, 5)) for spec in specs]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("command", ["prune", "convert-ops"])
def test_least_squares_lowers_the_error_of_every_layer(chain: Chain, command: str) -> None:
    errors = chain.printed[command]["layer_errors"]
    assert len(errors) > 10
    for error in errors:
        # The ridge term may cost a layer that was exact a trace of its error.
        assert error["after"] <= error["before"] + 1e-3
    assert sum(error["after"] for error in errors) < 0.7 * sum(error["before"] for error in errors)


def test_distillation_leaves_out_what_does_not_fit_and_trains_the_rest(chain: Chain) -> None:
    phases = chain.printed["distill"]["phases"]
    assert [phase["phase"] for phase in phases] == [1, 3]  # 2 prepares for pruning, which is done
    for phase in phases:
        assert phase["num_steps"] == 4 and phase["resumed_from"] is None
        assert phase["history"] and all(math.isfinite(v) for entry in phase["history"] for v in entry.values())
    same = chain.printed["distill"]["same_clips"]
    assert same["num_clips"] in (1, 2) and 10 < same["psnr_db_before"] < 100 and 10 < same["psnr_db_after"] < 100
    _, before = read_artifact(chain.folder / "converted.safetensors")
    _, after = read_artifact(chain.folder / "flash.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_report_is_json_with_sensible_figures(chain: Chain) -> None:
    report = read_report(chain.folder / "report")
    assert [decoder["name"] for decoder in report["decoders"]] == [
        "original", "original, exact", "flash", "pruned"
    ]  # fmt: skip
    original, tuned, flash, pruned = report["decoders"]
    assert original["to_original"] is None and original["speedup"] is None
    assert original["num_parameters"] > pruned["num_parameters"] > flash["num_parameters"]
    assert original["gflops_per_frame"] > pruned["gflops_per_frame"] > flash["gflops_per_frame"]
    for decoder in (original, flash, pruned):
        check_quality(decoder["to_ground_truth"])
        assert decoder["retention_percent"]["psnr_db"] > 50
    for decoder in (flash, pruned):
        check_quality(decoder["to_original"])
        # Solved by least squares, both are far nearer to the original than that is to the video.
        assert decoder["to_original"]["psnr_db"] > original["to_ground_truth"]["psnr_db"] + 6
    for decoder in (tuned, flash, pruned):
        assert 0 < decoder["speedup"]["min"] <= decoder["speedup"]["median"] <= decoder["speedup"]["max"]
    assert {clip["clip"] for clip in report["clips"]} == {"clip.mp4"}
    for clip in report["clips"]:
        assert (clip["num_frames"], clip["height"], clip["width"]) == (NUM_FRAMES, HEIGHT, WIDTH)


def check_quality(quality: dict[str, Any]) -> None:
    assert quality["num_frames"] == NUM_FRAMES
    assert quality["lpips"] is None
    assert 5 < quality["psnr_db"] < 100
    assert -1 <= quality["ssim"] <= 1
    assert quality["sharpness_ratio"] > 0 and quality["flicker"] >= 0


def test_the_video_has_the_frames_of_the_input(chain: Chain) -> None:
    assert count_frames(chain.folder / "report" / "clip.mp4") == count_frames(chain.folder / "clip.mp4") == NUM_FRAMES
    markdown = (chain.folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "clip.png" in markdown and "LPIPS" in markdown


def test_the_closed_form_beats_cut_weights(chain: Chain) -> None:
    succeed(
        f"prune vae.safetensors --ratio 0.5 --reconstruct none -o cut.sft --data clip.mp4 {CALIBRATION}",
        cwd=chain.folder,
    )
    succeed(f"eval pruned.safetensors --compare cut.sft -o cuts --no-video --data clip.mp4 {JUDGING}", cwd=chain.folder)
    decoders = {d["name"]: d["to_original"] for d in read_report(chain.folder / "cuts")["decoders"]}
    assert decoders["pruned"]["psnr_db"] > decoders["cut"]["psnr_db"] + 3


def test_commands_run_again_over_their_own_files(chain: Chain) -> None:
    before = chain.sha256("pruned.safetensors")
    again = succeed(STEPS["prune"], cwd=chain.folder)
    assert "up to date" in again["notes"][0] and again["selection"] == chain.printed["prune"]["selection"]
    succeed(f"{STEPS['prune']} --force", cwd=chain.folder)
    # Same input, same seed, one thread: the same bytes.
    assert chain.sha256("pruned.safetensors") == before
    succeed(f"eval pruned.safetensors --data clip.mp4 {JUDGING} -o again", cwd=chain.folder)
    succeed(f"eval pruned.safetensors --data clip.mp4 {JUDGING} -o again --no-video --force", cwd=chain.folder)


def test_pruning_twice_composes_the_kept_channels(chain: Chain) -> None:
    first = chain.header("pruned.safetensors").kept_channels
    printed = succeed(
        f"prune pruned.safetensors --ratio up2=0.5 -o twice.sft --data clip.mp4 {CALIBRATION}", cwd=chain.folder
    )
    header = chain.header("twice.sft")
    (stream,) = (record["kept"] for record in printed["selection"] if record["group"] == "up2.stream")
    assert header.kept_channels["up2.0"] == tuple(first["up2.0"][i] for i in stream)
    assert header.kept_channels["up3.0"] == first["up3.0"]
    assert header.original is not None and header.original.sha256 == chain.sha256("vae.safetensors")


def test_an_exported_student_can_be_worked_on_with_its_original_named(chain: Chain) -> None:
    """Other programs' layouts hold no lineage and no kept channels."""
    succeed("export pruned.safetensors --target safetensors -o student", cwd=chain.folder)
    student = "student/pruned.safetensors --original vae.safetensors --data clip.mp4"
    succeed(f"eval {student} {JUDGING} -o student-report --no-video", cwd=chain.folder)
    exported, pruned = (read_report(chain.folder / name)["decoders"][-1] for name in ("student-report", "report"))
    assert exported["to_original"] == pruned["to_original"]
    succeed(f"distill {student} --phase 3 --num-steps 1 {TRAINING} -o student.sft", cwd=chain.folder)
    printed = succeed(f"convert-ops {student} {CALIBRATION} -o converted.sft", cwd=chain.folder)
    assert "does not say which channels were kept" in printed["stderr"]
    assert operators(chain.spec("converted.sft"), "up3") == {"frame2d"}


@pytest.mark.unchecked
def test_export_writes_decoders_that_decode_the_same(chain: Chain) -> None:
    # The original: few calibration clips leave toy students so ill-conditioned that the order of additions shows.
    printed = succeed("export vae.safetensors", cwd=chain.folder)
    folder = chain.folder / "export"
    assert {path.name for path in folder.iterdir()} == {
        "vae.safetensors", "vae.onnx", "vae.onnx.data", "vae.step.first.onnx", "vae.step.next.onnx",
        "export.json", "README.md", "diffusers"
    }  # fmt: skip
    manifest = strict_json((folder / "export.json").read_text(encoding="utf-8"))
    assert manifest["sha256"] == chain.sha256("vae.safetensors") == printed["sha256"]

    decoder = load_checkpoint(chain.folder / "vae.safetensors", builtins={}).require_decoder()
    exported = load_checkpoint(folder / "vae.safetensors", builtins={})
    assert exported.layout == "wan-original"
    latents = torch.randn(1, decoder.spec.latent_width, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        frames = decode(decoder, latents)
        # The same weights; where they lie in memory may pick another kernel, which adds in another order.
        torch.testing.assert_close(decode(exported.require_decoder(), latents), frames, rtol=0, atol=2e-5)
    session = onnxruntime.InferenceSession(folder / "vae.onnx", providers=["CPUExecutionProvider"])
    (from_onnx,) = session.run(["frames"], {"latents": latents.numpy()})
    # The two runtimes add in other orders; the exporter itself allows 1e-4 of the range.
    torch.testing.assert_close(torch.from_numpy(np.asarray(from_onnx)), frames, rtol=0, atol=2e-4)
