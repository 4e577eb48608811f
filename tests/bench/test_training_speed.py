"""How fast distillation trains, and how much of that is waiting for clips. Prints tables; no time is asserted.

`FLASHVAED_BENCH_STEPS` changes the number of steps that are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashvaed_cli.artifact.checkpoint import derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.loop import TrainResult, train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import plan_phase_3
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe import DistillRecipe
from flashvaed_cli.report.tables import Column, TableData, to_rich
from flashvaed_cli.stages.distill.run import run_distill
from flashvaed_cli.stages.speed.run import device_with_threads
from flashvaed_cli.zoo.builtin import BUILTINS
from tests.bench.full_size import paper_layout, random_decoder, setting

NUM_STEPS = setting("STEPS", 10)
NUM_WARMUP_STEPS = 2
_COLUMNS = (
    Column("training", "s"),
    Column("steps/s", ".3f"),
    Column("clips/s", ".3f"),
    Column("waiting for data %", ".2f"),
    Column("peak memory GiB", ".2f"),
)
Row = tuple[str, float, float, float, float | None]


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def print_rows(title: str, rows: Sequence[Row]) -> None:
    Console(width=120).print(to_rich(TableData(title, _COLUMNS, tuple(rows))))


@pytest.mark.bench
@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_tiny_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    """The command as it is, on the clip that ships: the paper's layout at a half, with random weights."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student = Decoder(paper_layout(16, 0.5))
    original = load_checkpoint("builtin:tiny-wan", builtins=BUILTINS)
    save_checkpoint(Path("student.safetensors"), derived_header(original), decoder=student)
    recipe = DistillRecipe(
        input="student.safetensors",
        original="builtin:tiny-wan",
        phase="3",
        num_steps=NUM_STEPS,
        cache_latents="latents" if cached else None,
        device="cpu",
    )
    outcome = run_distill(recipe, progress=SilentProgress(), force=False, command_line="")
    (phase,) = outcome.figures["phases"]  # type: ignore[misc]
    share = 100 * phase["data_seconds"] / phase["seconds"]
    row = (
        "latents cached" if cached else "latents in memory",
        NUM_STEPS / phase["seconds"],
        phase["clips_per_s"],
        share,
    )
    place = device_with_threads(torch.device("cpu"))
    print_rows(f"builtin:tiny-wan, paper's layout at 1/2, 2 clips of 9x96x96, {place}", [(*row, None)])
    assert phase["num_steps"] == NUM_STEPS


def timed_on_cuda(num_steps: int, *, checkpoint_activations: bool, num_clips: int) -> TrainResult:
    """Train full-size Wan's paper layout against the original, both with random weights, on 17 x 256 x 256."""
    torch.manual_seed(0)
    teacher = random_decoder(wan_decoder_spec(96), "cuda")
    student = random_decoder(paper_layout(96, 0.125), "cuda").requires_grad_(True)
    settings = TrainSettings(
        num_steps=num_steps,
        learning_rate=1e-6,  # random weights must not explode meanwhile
        compute_dtype="bfloat16",
        channels_last=True,
        checkpoint_activations=checkpoint_activations,
        loss_weights=LossWeights(lpips=0.0, sharpness=1.0, energy=1.0, temporal=1.0),
    )
    latents = torch.randn(num_clips, 16, 5, 32, 32, device="cuda")
    return train(student, teacher, plan_phase_3(student.spec, teacher.spec), lambda _: (latents,), settings)


@pytest.mark.gpu
@pytest.mark.bench
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not measured: needs CUDA")
def test_full_size_on_a_gpu() -> None:
    rows: list[Row] = []
    for checkpoint_activations in (False, True):
        for num_clips in (1, 2):
            timed_on_cuda(NUM_WARMUP_STEPS, checkpoint_activations=checkpoint_activations, num_clips=num_clips)
            torch.cuda.reset_peak_memory_stats()
            result = timed_on_cuda(NUM_STEPS, checkpoint_activations=checkpoint_activations, num_clips=num_clips)
            peak = torch.cuda.max_memory_allocated() / 2**30
            label = f"batch {num_clips}" + (", activations recomputed" if checkpoint_activations else "")
            share = 100 * result.data_seconds / result.seconds
            rows.append((label, result.num_steps / result.seconds, result.clips_per_s, share, peak))
    place = device_with_threads(torch.device("cuda"))
    print_rows(f"Wan 2.1, paper's layout at 1/8, 17x256x256, bfloat16, {place}", rows)
    assert all(row[1] > 0 for row in rows)
