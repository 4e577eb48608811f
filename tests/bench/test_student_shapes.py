"""Narrowed decoders beside new, light ones: the same latents, the same minutes of training, one evaluation.

Prints a table for `builtin:tiny-wan` on the shipped clip that nothing is fitted to. New decoders get the greatest width
at which they are as fast as the decoder that keeps half of its shallow channels. Each trains for
`FLASHVAED_BENCH_SECONDS` (120).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.light import LightShape, light_spec
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.metrics.speed import time_alternating
from flashvaed_cli.report.tables import Column, TableData, to_rich
from flashvaed_cli.zoo.builtin import BUILTINS

SECONDS = float(os.environ.get("FLASHVAED_BENCH_SECONDS", "120"))
CLIPS = "--num-clips 40 --num-frames 9 --crop-size 96 --batch-size 1 --cache-latents latents"
LOSS = "--loss-weight mse=1 --loss-weight energy=0.002 --loss-weight l1=0 --loss-weight lpips=0 "
LOSS += "--loss-weight feature=0 --loss-weight ssim=0 --ema-decay 0.98"
CALIBRATION = "--num-calibration-clips 10 --num-frames 9 --crop-size 96"
PROBE_STEPS = 12
NARROWED = {"flash-2": 0.5, "flash-4": 0.25}
SHAPES: tuple[LightShape, ...] = ("tae", "temporal-tae", "efficientvit", "lean")
WIDTHS = range(8, 513, 8)
GRID = (3, 27, 48)  # latents of 9 frames as large as those of the judged clip


def flashvaed(words: str, folder: Path) -> dict[str, Any]:
    """Run the program with all cores; what it prints as JSON."""
    command = [sys.executable, "-m", "flashvaed_cli", *words.split(), "--json", "--quiet", "--force"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def trained(words: str, output: str, folder: Path) -> int:
    """Train for `SECONDS`, as many steps as a short run has shown to fit; returns their number."""
    probe = flashvaed(f"distill {words} --num-steps {PROBE_STEPS} --output probe.safetensors", folder)
    (phase,) = probe["phases"]
    num_steps = round(SECONDS * PROBE_STEPS / phase["seconds"])
    flashvaed(f"distill {words} --num-steps {num_steps} --output {output}.safetensors", folder)
    return num_steps


def spec_of(location: str) -> DecoderSpec:
    decoder = load_checkpoint(location, builtins=BUILTINS).decoder
    assert decoder is not None
    return decoder.spec


def runtime(spec: DecoderSpec) -> DecodeRuntime:
    """A decoder with random weights, run as `eval` runs it."""
    decoder = exact_decoder(Decoder(spec).eval().requires_grad_(False))
    return DecodeRuntime(decoder, DecodeSettings(), shares_weights=True)


@torch.inference_mode()
def width_as_fast_as(model: DecoderSpec, shape: LightShape, original: DecoderSpec) -> int:
    """The greatest of `WIDTHS` at which the median of three decodings in turns takes no longer than the model's.

    Of those that take no more than four times its operations: the rest are slower for certain.
    """
    latents = torch.randn(1, original.latent_width, *GRID)
    reference = runtime(model)
    most = 4 * total_gflop(model, GRID)
    widths = [width for width in WIDTHS if total_gflop(light_spec(shape, original, width), GRID) <= most]

    def is_slower(width: int) -> bool:
        student = runtime(light_spec(shape, original, width))
        calls = {"model": lambda: reference.decode(latents), "student": lambda: student.decode(latents)}
        times = time_alternating(calls, num_rounds=3)
        print(shape, width, {name: round(result.median, 3) for name, result in times.items()}, flush=True)
        return times["student"].median > times["model"].median

    return widths[max(bisect_left(widths, True, key=is_slower) - 1, 0)]


@pytest.mark.bench
def test_shapes_of_students(tmp_path: Path) -> None:
    steps: dict[str, int] = {}
    for name, ratio in NARROWED.items():
        flashvaed(f"prune --ratio {ratio} {CALIBRATION} --output {name}-pruned.safetensors", tmp_path)
        converted = f"{name}-solved.safetensors"
        flashvaed(f"convert-ops {name}-pruned.safetensors {CALIBRATION} --output {converted}", tmp_path)
        steps[name] = trained(f"{converted} --phase 3 --learning-rate 1e-4 {CLIPS} {LOSS}", name, tmp_path)
    flash, original = spec_of(str(tmp_path / "flash-2.safetensors")), spec_of("builtin:tiny-wan")
    for shape in SHAPES:
        width = width_as_fast_as(flash, shape, original)
        name = f"{shape}-{width}"
        steps[name] = trained(
            f"builtin:tiny-wan --student {shape} --student-width {width} {CLIPS} {LOSS}", name, tmp_path
        )
    first, *others = steps
    compared = " ".join(f"--compare {name}.safetensors" for name in others)
    report = flashvaed(
        f"eval {first}.safetensors {compared} --lpips off --vmaf off --no-video --num-frames 33", tmp_path
    )
    columns = (
        Column("decoder", align="left"),
        Column("steps", "d"),
        Column("PSNR to the original, dB", ".2f"),
        Column("PSNR kept, %", ".1f"),
        Column("sharpness kept, %", ".1f"),
        Column("frames/s", ".2f"),
        Column("× eager", ".2f"),
        Column("GFLOP a frame", ".2f"),
        Column("million parameters", ".3f"),
    )
    rows = tuple(
        (
            one["name"],
            steps.get(one["name"]),
            one["to_original"] and one["to_original"]["psnr_db"],
            one["retention_percent"]["psnr_db"],
            one["retention_percent"]["sharpness_ratio"],
            one["frames_per_second"],
            one["speedup"] and one["speedup"]["median"],
            one["gflops_per_frame"],
            one["num_parameters"] and one["num_parameters"] / 1e6,
        )
        for one in report["decoders"]
    )
    Console(width=160).print(
        to_rich(TableData(f"Students of builtin:tiny-wan, {SECONDS:g} s of training", columns, rows))
    )
    assert {row[0] for row in rows} >= set(steps)
