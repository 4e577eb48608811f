"""Clips per second on the way to training: decoding videos and encoding them, and reading them from a cache.

`FLASHVAED_BENCH_DATA` names a folder of videos (by default `../shared/data/clips`, else the shipped clip),
`FLASHVAED_BENCH_CLIPS` how many clips of 17 x 128 x 128 to cut from them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.fields import BUILTIN_VAE
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from flashvaed_cli.stages.common.loading import load_inputs
from flashvaed_cli.stages.distill.data import TrainingData, training_data

FOLDER = Path(os.environ.get("FLASHVAED_BENCH_DATA", Path(__file__).parents[3] / "shared/data/clips"))
NUM_CLIPS = int(os.environ.get("FLASHVAED_BENCH_CLIPS", "32"))
NUM_WORKERS = (0, 1, 2)
NUM_READS = 2000


@pytest.mark.bench
def test_clips_per_second_with_workers_and_from_the_cache(tmp_path: Path) -> None:
    inputs = load_inputs(BUILTIN_VAE, original=None, family=None, device=torch.device("cpu"), progress=SilentProgress())
    rows: list[tuple[Cell, ...]] = []

    def prepare(what: str, num_workers: int, cache: Path | None) -> TrainingData:
        recipe = DistillRecipe(
            data=(str(FOLDER),) if FOLDER.is_dir() else (),
            num_frames=17,
            crop_size=128,
            num_clips=NUM_CLIPS,
            num_workers=num_workers,
            cache_latents=None if cache is None else str(cache),
        )
        start = time.perf_counter()
        data = training_data(recipe, inputs, SilentProgress(), num_drawn=NUM_CLIPS)
        seconds, num_clips = time.perf_counter() - start, data.record()["num_clips"]
        rows.append((what, num_clips, seconds, num_clips / seconds))
        return data

    def read(what: str, data: TrainingData) -> None:
        draw = data.draw(batch_size=4, seed=0)
        start = time.perf_counter()
        for step in range(NUM_READS // 4):
            draw(step)
        seconds = time.perf_counter() - start
        rows.append((what, NUM_READS, seconds, NUM_READS / seconds))

    made = [prepare(f"decode and encode, {n} workers", n, None) for n in NUM_WORKERS]
    written = prepare("the same into a cache, 1 worker", 1, tmp_path)
    opened = prepare("check and open the cache", 0, tmp_path)
    read("draw from memory", made[0])
    read("draw from the cache", opened)
    columns = (Column("what"), Column("clips", "d"), Column("s", ".2f"), Column("clips/s", ".1f"))
    title = f"Training data, 17 x 128 x 128, builtin:tiny-wan on the CPU, {torch.get_num_threads()} threads"
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))
    expected = made[0].draw(batch_size=4, seed=0)(0)[0]
    for data in (*made, written, opened):
        assert torch.equal(data.draw(batch_size=4, seed=0)(0)[0], expected)
