"""A full-size VAE, random weights: time and memory of analyze, prune to the paper's width and convert-ops.

Prints a table for 4 calibration clips of 9 frames of 256 x 256, and the memory of 16. `FLASHVAED_BENCH_FAMILY` (wan2.1)
chooses, `_WIDTH` (the released one), `_FRAMES`, `_SIDE` and `_CLIPS` (numbers separated by spaces) change the sizes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from tests.bench.full_size import setting

FAMILY = get_family(os.environ.get("FLASHVAED_BENCH_FAMILY", "wan2.1"))
WIDTH, FRAMES, SIDE = setting("WIDTH", FAMILY.released_base_width), setting("FRAMES", 9), setting("SIDE", 256)
NUM_CLIPS = [int(n) for n in os.environ.get("FLASHVAED_BENCH_CLIPS", "4 16").split()]


def write_random_vae(path: Path) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(FAMILY.decoder_spec(WIDTH, FAMILY.latent_width)).eval()
    encoder = Encoder(FAMILY.encoder_spec(WIDTH, FAMILY.latent_width)).eval()
    mean = FAMILY.latent_mean or (0.0,) * FAMILY.latent_width
    std = FAMILY.latent_std or (1.0,) * FAMILY.latent_width
    header = ArtifactHeader(kind="vae", family=FAMILY.name, latent_mean=mean, latent_std=std)
    save_checkpoint(path, header, decoder=decoder, encoder=encoder)
    return path


def run(words: list[str], folder: Path) -> tuple[float, float]:
    """Run `flashvaed WORDS`; returns seconds and the peak of its resident set in GB."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])  # the clone, wherever the folder is
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "flashvaed_cli", *words], cwd=folder, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, words
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


@pytest.mark.bench
def test_full_size_pipeline(tmp_path: Path) -> None:
    vae = write_random_vae(tmp_path / "original.safetensors")
    rows: list[tuple[Cell, ...]] = []
    peaks: dict[int, float] = {}
    for num_clips in NUM_CLIPS:
        calibration = f"--num-calibration-clips {num_clips} --num-frames {FRAMES} --crop-size {SIDE} --quiet".split()
        folder = tmp_path / str(num_clips)
        folder.mkdir()
        steps = {
            "analyze": ["analyze", str(vae), *calibration],
            f"prune --ratio {FAMILY.paper_keep_ratio}": [
                "prune",
                str(vae),
                "--ratio",
                str(FAMILY.paper_keep_ratio),
                *calibration,
            ],
            "convert-ops": ["convert-ops", "pruned.safetensors", *calibration],
        }
        measured = {name: run(words, folder) for name, words in steps.items()}
        rows += [(num_clips, name, seconds, peak) for name, (seconds, peak) in measured.items()]
        peaks[num_clips] = max(peak for _, peak in measured.values())
        rows.append((num_clips, "all", sum(seconds for seconds, _ in measured.values()), peaks[num_clips]))
        print(rows[-4:], flush=True)
    columns = (Column("clips", "d"), Column("command", align="left"), Column("s", ".0f"), Column("peak RSS, GB", ".2f"))
    cores = len(os.sched_getaffinity(0))
    title = f"{FAMILY.name} at base width {WIDTH}, clips of {FRAMES} frames of {SIDE} x {SIDE}, float32, {cores} cores"
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))
    assert max(peaks.values()) < 1.15 * min(peaks.values())  # what the allocator holds back differs from run to run
