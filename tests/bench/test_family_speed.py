"""Every family at full size, random weights: parameters, cost and speed of the Flash decoder against the original.

Flash is the family's own layout (`Family.paper_operators` and `paper_keep_ratio`); mild is the original at 0.7 of its
base width, where the family's stock class has a decoder width of its own. Four decoders take turns: the original with
plain operators, run eagerly; the original with exact operators; mild; Flash. One family at a time: the largest needs
about 10 GB. Prints one table; nothing is asserted about times.

`FLASHVAED_BENCH_FAMILIES=wan2.2,ltx-2` chooses, `FLASHVAED_BENCH_ROUNDS` is the number of rounds (3),
`FLASHVAED_BENCH_SIDE` the side of the frames (256).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from rich.table import Table

from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.variants.exact import exact_spec
from flashvaed_cli.decoders.variants.still import still_spec
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.registry import FAMILIES, get_family
from flashvaed_cli.metrics.speed import speed_ratio, time_alternating
from flashvaed_cli.surgery.native import base_width_step, native_spec, nearest_base_width
from tests.bench.full_size import flash_layout, random_decoder, setting

ROUNDS, SIDE = setting("ROUNDS", 3), setting("SIDE", 256)
RUNS = ("eager", "exact", "mild", "Flash")
RATIOS = (("mild", "eager"), ("mild", "exact"), ("Flash", "eager"), ("Flash", "exact"))
MILD_RATIO = 0.7  # of recipes/mild.yaml
SHORT_CLIP = 8  # frames of a family that has a latent for each
WITH_OPERATORS = ",".join(name for name, family in FAMILIES.items() if family.paper_operators)
CHOSEN = os.environ.get("FLASHVAED_BENCH_FAMILIES", WITH_OPERATORS).split(",")


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    rows = Table(title=f"Flash against the original, float32, {SIDE} x {SIDE}, random weights, {ROUNDS} rounds")
    rows.add_column("family")
    for name in (
        "frames",
        "M parameters",
        "GFLOP",
        *(f"{run} s" for run in RUNS),
        *(" x ".join(pair) for pair in RATIOS),
    ):
        rows.add_column(name, justify="right")
    yield rows
    Console(width=150).print(rows)


def num_frames(family: Family, original: DecoderSpec) -> int:
    """A few latents of a video; one image of a family of images."""
    if original.temporal_factor == 1:
        return SHORT_CLIP if original.sees_whole_clip else 1
    return 1 if family.name.startswith("qwen-image") else 1 + 2 * original.temporal_factor


def mild_layout(original: DecoderSpec, family: Family) -> DecoderSpec | None:
    """What `prune --layout native --ratio 0.7` makes of an original; None where no stock class could build it."""
    if family.native_obstacle is not None:
        return None
    step = base_width_step(original, 1)
    return native_spec(original, nearest_base_width(family.released_base_width, MILD_RATIO, step))


def runtime(spec: DecoderSpec, *, plain: bool = False) -> DecodeRuntime:
    """A decoder as it is run: the original as it comes, or with the exact operators of this machine."""
    decoder = random_decoder(spec if plain else exact_spec(spec, device_type="cpu"), "cpu")
    return DecodeRuntime(decoder, DecodeSettings(memory_format="contiguous" if plain else "channels-last"))


@pytest.mark.bench
@pytest.mark.parametrize("name", CHOSEN)
@torch.no_grad()
def test_flash_against_its_original(name: str, table: Table) -> None:
    family = get_family(name)
    original = family.decoder_spec(family.released_base_width, family.latent_width)
    frames = num_frames(family, original)
    # What `convert-ops --profile image` starts with.
    reference = still_spec(original) if frames == 1 and not original.still else original
    flash = flash_layout(reference, family, family.paper_keep_ratio)
    side = SIDE // original.spatial_factor
    grid = (original.num_latents(frames), side, side)
    torch.manual_seed(0)
    latents = torch.randn(1, family.latent_width, *grid)
    specs = {"exact": reference, "mild": mild_layout(original, family), "Flash": flash}
    runners = {"eager": runtime(original, plain=True)} | {key: runtime(spec) for key, spec in specs.items() if spec}
    speeds = time_alternating(
        {key: lambda chosen=chosen: chosen.decode(latents) for key, chosen in runners.items()}, num_rounds=ROUNDS
    )
    compared = [spec for spec in (original, specs["mild"], flash) if spec]
    over = {(fast, slow): speed_ratio(speeds[slow], speeds[fast]) for fast, slow in RATIOS if fast in speeds}
    parameters = [random_decoder(spec, "meta").parameter_count / 1e6 for spec in compared]
    row = (
        name,
        str(frames),
        " → ".join(f"{count:.1f}" for count in parameters),
        " → ".join(f"{total_gflop(spec, grid):.0f}" for spec in compared),
        *(f"{speeds[key].median:.3g}" if key in speeds else "–" for key in RUNS),
        *(f"{r.median:.1f} ({r.min:.1f}–{r.max:.1f})" if (r := over.get(pair)) else "–" for pair in RATIOS),
    )
    print("", *row, sep=" | ", flush=True)  # a long run shows what it has
    table.add_row(*row)
    assert total_gflop(flash, grid) < total_gflop(original, grid)
    runners.clear()
    gc.collect()
