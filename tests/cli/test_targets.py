"""`prune --target-speedup` and `--target-gflops` on a small decoder. Nothing here asserts how fast anything is."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from flashvaed_cli.artifact.measured import WidthTimes
from flashvaed_cli.artifact.store import read_artifact, read_header, write_artifact
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.stages import latency_model
from flashvaed_cli.stages.latency_model import width_latency
from tests.commands import CALIBRATION, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae

SIZE = "--latency-frames 1 --latency-side 32"
ANALYZE = f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} {SIZE} --num-latency-rounds 1"
PRUNE = f"prune vae.safetensors --reconstruct none --data clip.mp4 {CALIBRATION}"
GRID = (1, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    succeed(f"{ANALYZE} --width-latency-s 1", cwd=folder)
    succeed(f"{ANALYZE} --width-latency-s 0 -o bare.safetensors", cwd=folder)
    header, tensors = read_artifact(folder / "analysis.safetensors")
    model = _paced(header.measured["width_latency"])
    paced = header.model_copy(update={"measured": {**header.measured, "width_latency": model}})
    write_artifact(folder / "paced.safetensors", tensors, paced)
    return folder


def _paced(model: dict[str, Any]) -> dict[str, Any]:
    """The same grid with times that follow the widths: those of a decoder this small are nothing but noise."""
    blocks = [
        {**block, "latency_ms": [math.prod(point) for point in itertools.product(*block["widths"])]}
        for block in model["blocks"]
    ]
    return {**model, "fixed_ms": 1.0, "blocks": blocks}


def test_the_analysis_holds_a_latency_model(folder: Path) -> None:
    record = read_header(folder / "analysis.safetensors").measured["width_latency"]
    assert (record["num_frames"], record["side"], record["device"], record["dtype"]) == (1, 32, "cpu", "float32")
    assert (record["layout"], record["stages"]) == ("channels-last, exact operators", ["up2", "up3"])
    model = width_latency(WidthTimes.model_validate(record))
    assert model({name: ladder[0] for name, ladder in model.ladders.items()}) > model.fixed_ms > 0
    assert "width_latency" not in read_header(folder / "bare.safetensors").measured


def test_a_speedup_target_is_predicted_and_measured(folder: Path) -> None:
    printed = succeed(f"{PRUNE} --analysis paced.safetensors --target-speedup 2 -o fast.safetensors", cwd=folder)
    header = read_header(folder / "fast.safetensors")
    record = header.measured["budget"]
    assert printed["budget"] == record
    assert record["target_speedup"] == 2 and record["target_gflops"] is None
    assert record["predicted"]["speedup"] >= 2
    measured = record["measured"]
    assert 0 < measured["speedup_min"] <= measured["speedup"] <= measured["speedup_max"]
    assert (record["num_frames"], record["side"], record["layout"]) == (1, 32, "channels-last, exact operators")
    kept = {one["group"]: len(one["kept"]) for one in header.measured["selection"]}
    assert kept
    assert kept == {one["group"]: one["num_kept"] for one in record["groups"] if one["num_kept"] < one["width"]}


def test_a_gflop_target_is_met(folder: Path) -> None:
    header = read_header(folder / "vae.safetensors")
    assert header.decoder is not None
    full = total_gflop(header.decoder, GRID)
    target = 0.7 * full
    succeed(f"{PRUNE} --target-gflops {target} --round-to 2 -o light.safetensors", cwd=folder)
    header = read_header(folder / "light.safetensors")
    assert header.decoder is not None
    record = header.measured["budget"]
    assert record["gflop_before"] == pytest.approx(full)
    assert record["gflop_after"] == pytest.approx(total_gflop(header.decoder, GRID))
    assert record["gflop_after"] <= target
    assert record["predicted"] is None and record["measured"]["speedup"] > 0
    assert all(one["num_kept"] % 2 == 0 for one in record["groups"])


def test_people_see_predicted_beside_measured(folder: Path) -> None:
    result = invoke(f"{PRUNE} --analysis paced.safetensors --target-speedup 2 -o seen.safetensors", cwd=folder)
    assert result.exit_code == 0, result.stderr
    assert "Budget: speed-up 2, 1 frame of 32 x 32" in result.stdout
    assert "predicted" in result.stdout and "measured" in result.stdout


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--analysis bare.safetensors --latency-frames 1 --latency-side 16", "holds no latency model"),
        ("--latency-side 16", "side 32 instead of 16"),
        ("--dtype bfloat16", "dtype float32 instead of bfloat16"),
    ],
)
def test_without_a_fitting_model_it_is_measured_on_the_fly(
    folder: Path, flags: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_model, "_NUM_ROUNDS", 1)
    result = invoke(f"{PRUNE} --target-speedup 1000 {flags} -o never.safetensors", cwd=folder)
    assert result.exit_code == 2
    assert reason in result.stderr and "measuring it now" in result.stderr
    assert "a speed-up of 1000 is out of reach" in result.stderr and "convert-ops" in result.stderr
    assert not (folder / "never.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--target-speedup 1", ["--target-speedup = 1.0", "greater than 1"]),
        ("--target-gflops 0", ["--target-gflops = 0.0", "greater than 0"]),
        ("--target-gflops 1000000", ["asks for nothing: the decoder takes"]),
        ("--target-gflops 0.000001", ["out of reach", "convert-ops"]),
        ("--target-speedup 2 --target-gflops 3", ["--target-speedup, --target-gflops:", "give one target, or ratios"]),
        ("--target-speedup 2 --ratio 0.5", ["--ratio, --target-speedup:"]),
        ("--target-gflops 2 --ratio up3=0.5", ["--ratio, --target-gflops:"]),
    ],
)
def test_targets_that_make_no_sense_are_refused(folder: Path, flags: str, parts: list[str]) -> None:
    result = invoke(f"{PRUNE} {flags} -o never.safetensors", cwd=folder)
    assert result.exit_code == 2
    for part in parts:
        assert part in result.stderr
    assert not (folder / "never.safetensors").exists()


def test_a_target_replaces_the_ratios_of_a_recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text("prune: {stage_keep_ratios: {up2: 0.5}, keep_ratio: 0.5}", encoding="utf-8")
    target = "--analysis paced.safetensors --target-speedup 2"
    printed = succeed(f"{PRUNE} --recipe r.yaml {target} -o other.safetensors", cwd=folder)
    assert printed["budget"]["target_speedup"] == 2
