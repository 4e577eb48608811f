"""How far minutes of training go: reconstruction only, the fast recipe, the paper's order, a student from nothing.

Runs the commands themselves on `builtin:tiny-wan`, judges on clips that nothing was fitted on, and prints one table and
the curves of the fast recipe (a PNG beside the artifacts in `FLASHVAED_BENCH_DIR`, by default `build/bench`; finished
artifacts there are taken up). `FLASHVAED_BENCH_DATA` names the videos, see `quality_data.py`;
`FLASHVAED_BENCH_STEPS` the optimizer steps of every student.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.store import read_header
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.report.charts import style
from flashvaed_cli.report.charts.training import training_curves
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from flashvaed_cli.zoo.builtin import BUILTINS
from tests.bench.full_size import setting
from tests.bench.quality_data import split_videos

NUM_STEPS = setting("STEPS", 400)
FOLDER = Path(os.environ.get("FLASHVAED_BENCH_DIR", "build/bench")).resolve()
RATIOS = (0.5, 0.25)
SCALE = ["--max-side", "256"]
CALIBRATION = [*SCALE, "--num-calibration-clips", "16", "--num-frames", "9", "--crop-size", "128"]
CLIPS = [*SCALE, "--num-clips", "192", "--batch-size", "1", "--num-frames", "9", "--crop-size", "128"]
FAST = ["--recipe", "fast", "--phase", "3"]
# The paper's optimizer and losses, but for LPIPS, whose weights are not shipped.
PAPER = ["--optimizer", "adamw", "--max-relative-step", "0", "--learning-rate", "1e-4", "--loss-weight", "lpips=0"]


class Bench:
    """Runs commands on training data, each once, and remembers how long they took."""

    def __init__(self, training: Sequence[str], judged: Sequence[str]) -> None:
        self.data = [word for path in training for word in ("--data", path)]
        self.validation = [word for path in judged for word in ("--validation-data", path)]
        self.judged = [word for path in judged for word in ("--data", path)]

    def run(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "flashvaed_cli", *words, "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
        return json.loads(done.stdout)

    def make(self, name: str, *words: str, data: bool = True) -> Path:
        """The artifact that a command writes, with the seconds that all steps up to it took beside it."""
        path = FOLDER / f"{name}.safetensors"
        if not path.exists():
            began = time.monotonic()
            self.run(*words, *(self.data if data else []), "--output", str(path))
            path.with_suffix(".seconds").write_text(f"{time.monotonic() - began:.1f}", encoding="utf-8")
        print(f"{name}: {seconds(path):.0f} s", flush=True)
        return path

    def distill(self, name: str, source: Path, *words: str, num_steps: int = NUM_STEPS) -> Path:
        fixed = ["--num-steps", str(num_steps), "--validate-every-steps", str(max(num_steps // 8, 1))]
        return self.make(name, "distill", str(source), *CLIPS, *self.validation, *fixed, *words)

    def judge(self, path: Path) -> tuple[float, float, float]:
        """PSNR to the original's output, and shares of the original's PSNR to the video and sharpness in percent."""
        folder = FOLDER / f"{path.stem}-report"
        words = [*SCALE, "--num-frames", "17", "--no-video", "--lpips", "off", "--num-speed-rounds", "1"]
        self.run("eval", str(path), *self.judged, *words, "--output", str(folder))
        decoders = json.loads((folder / "report.json").read_text(encoding="utf-8"))["decoders"]
        judged = decoders[-1]  # the originals come first
        shares = judged["retention_percent"]
        return judged["to_original"]["psnr_db"], shares["psnr_db"], shares["sharpness_ratio"]


def seconds(*paths: Path) -> float:
    return sum(float(path.with_suffix(".seconds").read_text(encoding="utf-8")) for path in paths)


def random_student(like: Path) -> Path:
    """The same architecture with torch's initial weights."""
    path = FOLDER / f"{like.stem}-random.safetensors"
    checkpoint = load_checkpoint(str(like), builtins=BUILTINS)
    torch.manual_seed(0)
    save_checkpoint(path, read_header(like), decoder=Decoder(checkpoint.require_decoder().spec), force=True)
    path.with_suffix(".seconds").write_text("0", encoding="utf-8")
    return path


def curves(name: str, path: Path) -> dict[str, list[tuple[float, float]]]:
    """Validation figures by minutes of training."""
    found: dict[str, list[tuple[float, float]]] = {}
    shown = {"validation_psnr_db": "PSNR to the original, dB", "validation_sharpness": "sharpness"}
    for phase in read_header(path).measured["phases"]:
        for entry in phase["history"]:
            for figure in shown.keys() & entry.keys():
                found.setdefault(f"{name}, {shown[figure]}", []).append((entry["seconds"] / 60, entry[figure]))
    return found


@pytest.mark.bench
def test_quality_against_training_time() -> None:
    training, judged = split_videos()
    if not judged:
        pytest.skip("needs a folder of videos in FLASHVAED_BENCH_DATA, some of them named in FLASHVAED_BENCH_HELD_OUT")
    FOLDER.mkdir(parents=True, exist_ok=True)
    bench = Bench(training, judged)
    rows: list[tuple[Cell, ...]] = []
    drawn: dict[str, list[tuple[float, float]]] = {}

    def add(label: str, path: Path, spent: float) -> None:
        rows.append((label, spent / 60, *bench.judge(path)))
        print(rows[-1], flush=True)

    for ratio in RATIOS:
        name = f"r{ratio}"
        pruned = bench.make(f"{name}-pruned", "prune", "builtin:tiny-wan", "--ratio", str(ratio), *CALIBRATION)
        solved = bench.make(f"{name}-solved", "convert-ops", str(pruned), *CALIBRATION)
        add(f"{ratio}: reconstruction only", solved, seconds(pruned, solved))
        fast = bench.distill(f"{name}-fast", solved, *FAST)
        add(f"{ratio}: fast recipe", fast, seconds(pruned, solved, fast))
        drawn |= curves(f"{ratio}", fast)
    add_paper_and_random(bench, add)
    figure = training_curves(drawn, style.PAPER, title="Fast recipe, held-out clips", x_label="minutes of training")
    style.save_png(figure, FOLDER / "distillation.png")
    columns = (
        Column("student", align="left"),
        Column("minutes", ".1f"),
        Column("PSNR to original dB", ".2f"),
        Column("PSNR to video, % of original's", ".2f"),
        Column("sharpness, % of original's", ".1f"),
    )
    Console(width=120).print(to_rich(TableData(f"{NUM_STEPS} steps each", columns, tuple(rows))))
    best = {str(row[0]): float(row[2]) for row in rows}  # type: ignore[arg-type]
    assert best["0.5: fast recipe"] > best["0.5: reconstruction only"]
    assert best["0.25: fast recipe"] > best["0.25: reconstruction only"]


def add_paper_and_random(bench: Bench, add: Any) -> None:
    """The paper's order with a third of the steps for each phase, and the same student from torch's weights; at 1/2."""
    third = NUM_STEPS // 3
    ratio = ["--ratio", "0.5"]
    swapped = bench.make("paper-converted", "convert-ops", "builtin:tiny-wan", "--reconstruct", "none", data=False)
    first = bench.distill("paper-phase1", swapped, *PAPER, "--phase", "1", num_steps=third)
    second = bench.distill("paper-phase2", first, *PAPER, "--phase", "2", *ratio, num_steps=third)
    pruned = bench.make("paper-pruned", "prune", str(second), *ratio, "--reconstruct", "none", *CALIBRATION)
    third_phase = bench.distill("paper-phase3", pruned, *PAPER, "--phase", "3", num_steps=NUM_STEPS - 2 * third)
    add("0.5: paper's recipe", third_phase, seconds(swapped, first, second, pruned, third_phase))
    start = random_student(FOLDER / "r0.5-solved.safetensors")
    trained = bench.distill("random-fast", start, *FAST)
    add("0.5: fast recipe from random weights", trained, seconds(trained))
