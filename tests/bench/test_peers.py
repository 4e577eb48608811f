"""Full-size decoders of Wan 2.1's latents, ours and other people's, random weights, in turns.

diffusers, the original as it comes and with exact operators, the mild native student, Flash; beside them the released
Flash-VAED student and TAEHV, each in its own code. That code is read from `FLASHVAED_BENCH_PEERS` (a folder with
clones, `build/peers`), and cloned into it if it is not there; without a network, or without einops, which one of them
imports, those rows say so. Prints two tables for
each size; nothing is asserted about times. `FLASHVAED_BENCH_SIZES="9x256x256 17x256x256"` (frames, height, width) and
`FLASHVAED_BENCH_DTYPES="float32 bfloat16"` choose, `FLASHVAED_BENCH_ROUNDS` is the number of rounds (3),
`FLASHVAED_BENCH_COMPILE=1` adds compiled ones.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.metrics.contest import Contestant, ContestResult, run_contest
from flashvaed_cli.metrics.roofline import measure_rates
from flashvaed_cli.report.speed import SpeedRow, SpeedTable, machine_table, time_table
from flashvaed_cli.report.tables import to_markdown
from flashvaed_cli.stages.speed.contestants import diffusers_call
from flashvaed_cli.stages.speed.table import TimedSize, counted_spec, ratio_of_rounds, seconds_of_rounds
from tests.bench.full_size import paper_layout, random_decoder, setting
from tests.bench.peers import NotAtHand, clone_of

SIZES = [TimedSize(*map(int, one.split("x"))) for one in os.environ.get("FLASHVAED_BENCH_SIZES", "9x256x256").split()]
DTYPES = [getattr(torch, name) for name in os.environ.get("FLASHVAED_BENCH_DTYPES", "float32 bfloat16").split()]
ROUNDS, COMPILE = setting("ROUNDS", 3), bool(setting("COMPILE", 0))
RELEASED, TAEHV = "Flash-VAED, its own code", "TAEHV, its own code"
MILD_WIDTH = 67
EXACT, MILD, FLASH = "original, exact", f"mild (native width {MILD_WIDTH})", "Flash (384/24/12)"

Call = Callable[[], object]

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def their_module(repository: str, path: str) -> ModuleType:
    """A module of a clone, which is made if there is none."""
    clone = clone_of(repository)
    spec = importlib.util.spec_from_file_location(f"peer_{repository.replace('-', '_')}", clone / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NotAtHand(f"{repository}: {error}") from error
    return module


def ours(decoder: Decoder, latents: Tensor, *, plain: bool = False, compiled: bool = False) -> Call:
    layout = "contiguous" if plain else "channels-last"
    chosen = decoder if plain else exact_decoder(decoder)
    runtime = DecodeRuntime(chosen, DecodeSettings(dtype=latents.dtype, memory_format=layout, compile=compiled))
    return lambda: runtime.decode(latents)


def released_student(latents: Tensor) -> Call:
    """The released student's network, which takes a latent frame at a time and keeps what it has seen."""
    model = prepared(their_module("Flash-VAED", "models/wan/model_hybrid_aggressive.py")._video_vae(z_dim=16), latents)

    def run() -> Tensor:
        return torch.cat([model.decode(i, latents, (0.0, 1.0)) for i in range(latents.shape[2])], dim=2)

    return run


def taehv(latents: Tensor) -> Call:
    """TAEHV, all frames at once, which is its faster way."""
    model = prepared(their_module("taehv", "taehv.py").TAEHV(checkpoint_path=None), latents)
    ordered = latents.transpose(1, 2).contiguous()
    return lambda: model.decode_video(ordered, parallel=True, show_progress_bar=False)


def prepared(model: nn.Module, latents: Tensor) -> Any:
    return model.eval().requires_grad_(False).to(latents)


def counted_gflop(call: Call) -> float:
    """Operations of a network that is not ours, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@pytest.mark.bench
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_every_decoder_of_wan_latents(size: TimedSize, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    specs = {EXACT: wan_decoder_spec(96), MILD: wan_decoder_spec(MILD_WIDTH), FLASH: paper_layout(96, 0.125)}
    decoders = {name: random_decoder(spec, "cpu") for name, spec in specs.items()}
    original = decoders[EXACT]
    grid = size.grid(original.spec)
    latents = torch.randn(1, original.spec.latent_width, *grid).to(dtype)
    makers: dict[str, Callable[[], Call]] = {
        "diffusers, eager": lambda: diffusers_call(original, latents),
        "original, eager": lambda: ours(original, latents, plain=True),
        EXACT: lambda: ours(original, latents),
        MILD: lambda: ours(decoders[MILD], latents),
        FLASH: lambda: ours(decoders[FLASH], latents),
        RELEASED: lambda: released_student(latents),
        TAEHV: lambda: taehv(latents),
    }
    if COMPILE:
        makers["diffusers, compiled"] = lambda: diffusers_call(original, latents, compiled=True)
        for name in (EXACT, FLASH):
            makers[f"{name}, compiled"] = lambda name=name: ours(decoders[name], latents, compiled=True)
    plain_gflop = total_gflop(original.spec, grid)
    gflop: dict[str, float] = {
        "diffusers, eager": plain_gflop,
        "diffusers": plain_gflop,
        "original, eager": plain_gflop,
    }
    for name, decoder in decoders.items():
        gflop[name] = total_gflop(counted_spec(exact_decoder(decoder).spec, dtype), grid)
    contestants = [Contestant(name, make, absent(make, gflop, name)) for name, make in makers.items()]
    before = measure_rates(torch.device("cpu"), dtype)
    results = run_contest(contestants, "cpu", num_rounds=ROUNDS)
    rates = before.best(measure_rates(torch.device("cpu"), dtype))
    table = SpeedTable(
        num_frames=original.spec.num_frames(grid[0]),
        height=size.height,
        width=size.width,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows(results, gflop),
        matmul_gflop_per_s=rates.matmul_gflop_per_s,
        copy_gbyte_per_s=rates.copy_gbyte_per_s,
        label="Wan 2.1, full size, random weights",
    )
    console = Console(width=140)
    for view in (time_table, machine_table):
        console.print(f"\n{to_markdown(view(table))}", markup=False, highlight=False)
    console.print("Peak: what one warm decoding adds, without the weights.")
    for contestant in contestants:
        if contestant.refusal:
            console.print(f"{contestant.name}: {contestant.refusal}", markup=False)
    assert any(result.speed for result in results)


def absent(make: Callable[[], Call], gflop: dict[str, float], name: str) -> str | None:
    """Why a peer is not run; for one that is, its operations are counted."""
    if name not in (RELEASED, TAEHV):
        return None
    try:
        gflop[name] = counted_gflop(make())
    except NotAtHand as error:
        return str(error)
    return None


def rows(results: Sequence[ContestResult], gflop: dict[str, float]) -> tuple[SpeedRow, ...]:
    speeds = {result.name: result.speed for result in results}
    first, exact = results[0].speed, speeds[EXACT]
    return tuple(
        SpeedRow(
            name=result.name,
            seconds=seconds_of_rounds(result.speed),
            over_eager=None if result is results[0] else ratio_of_rounds(first, result.speed),
            over_exact=None if result.name == EXACT else ratio_of_rounds(exact, result.speed),
            peak_bytes=None if result.memory is None else result.memory.num_bytes,
            gflop=gflop.get(result.name.removesuffix(", compiled")),
            cold_start_s=result.cold_start_s,
            failure=result.failure,
        )
        for result in results
    )
