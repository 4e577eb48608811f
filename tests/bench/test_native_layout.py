"""What staying within the stock class costs: native and free layouts of equal operations, with no training.

Prints a table for `builtin:tiny-wan`, PSNR to the original's output on clips that no fit has seen, and two of speed at
full size, of Wan 2.1 and of FLUX.2. See `quality_data.py` for the clips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.predict.latency import width_ladder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.wan21.spec import WAN21, wan_decoder_spec
from flashvaed_cli.metrics.speed import speed_ratio, synchronizer, time_alternating
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from flashvaed_cli.surgery.budget import gflop_cost, group_curves, plan_gflops
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.native import native_base_width, native_spec, select_native
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.bench.quality_data import QualityData, load_quality_data

RULE = str(PruneRecipe.model_fields["rule"].default)
RATIOS = (0.7, 0.5)
FULL_WIDTH = WAN21.released_base_width
NUM_ROUNDS = 3
FLUX_2_SMALL = 96  # of the official small decoder: 96, 192, 384, 384 channels


def solved(data: QualityData, spec: DecoderSpec, kept: dict) -> Decoder:
    original = data.vae.require_decoder()
    student = transfer_weights(original, spec, kept)
    first = first_changed_block(original, student)
    assert first is not None
    reconstruct_coder(
        original, student, kept, data.calibration, first_block=first, settings=FitSettings(), progress=SilentProgress()
    )
    return student


@pytest.mark.bench
def test_the_price_of_being_native() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = load_quality_data()
    decoder = data.vae.require_decoder()
    spec = decoder.spec
    statistics = collect_statistics(decoder, data.calibration, num_clips=None, progress=SilentProgress())
    grid = (spec.num_latents(9), 128 // spec.spatial_factor, 128 // spec.spatial_factor)
    rows: list[tuple[Cell, ...]] = []
    whole = total_gflop(spec, grid)
    scopes = {"free, every stage": [stage.name for stage in spec.stages], "free, up2 and up3": WAN21.shallow_stages}
    for ratio in RATIOS:
        narrow = native_spec(spec, round(native_base_width(spec) * ratio))
        kept, _ = select_native(decoder, statistics, narrow, rule=RULE)
        gflop = total_gflop(narrow, grid)
        quality = {"native": data.psnr(solved(data, narrow, kept))}
        for name, stages in scopes.items():
            groups = [group for group in channel_groups(spec) if group.stage in stages]
            ladders = {group.name: width_ladder(group.width) for group in groups}
            curves = group_curves(decoder, statistics, stages, rule=RULE, seed=0)
            try:
                plan = plan_gflops(curves, gflop_cost(spec, grid), ladders, gflop)
            except ValueError:  # deep stages alone cost more
                continue
            kept, _ = select_channels(decoder, statistics, plan.keep_ratios, rule=RULE)
            quality[name] = data.psnr(solved(data, narrowed_spec(spec, kept), kept))
        names = ("native", *scopes)
        rows.append((f"{ratio:g}", whole / gflop, *(quality.get(name) for name in names)))
        print(rows[-1], flush=True)
    columns = (
        Column("ratio of the native one"),
        Column("fewer operations", ".2f"),
        *(Column(f"{name}, dB", ".2f") for name in ("native", *scopes)),
    )
    title = f"PSNR to the original's output at equal operations, no training; {data.source}"
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))
    assert len(rows) == len(RATIOS)


def with_random_weights(spec: DecoderSpec) -> Decoder:
    return Decoder(spec).eval().requires_grad_(False)


def printed_speeds(build: Callable[[int], DecoderSpec], widths: Sequence[int], latents: Tensor, title: str) -> None:
    """Native decoders in exact operators beside the original as it is; the first width is the original's."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    grid = (latents.shape[2], latents.shape[3], latents.shape[4])
    exact = {width: use_channels_last(exact_decoder(with_random_weights(build(width)))) for width in widths}
    eager, ordered = with_random_weights(build(widths[0])), channels_last(latents)
    runs = {"eager": lambda: eager(latents)}
    runs |= {str(width): (lambda one=decoder: one(ordered)) for width, decoder in exact.items()}
    times = time_alternating(
        runs, num_rounds=NUM_ROUNDS, synchronize=synchronizer(torch.device("cpu")), progress=SilentProgress()
    )
    rows: list[tuple[Cell, ...]] = []
    for width in widths:
        ratios = [speed_ratio(times[name], times[str(width)]) for name in ("eager", str(widths[0]))]
        shown = (f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})" for ratio in ratios)
        rows.append((width, total_gflop(build(width), grid), times[str(width)].median, *shown))
    columns = (
        Column("base width"),
        Column("GFLOP", ",.0f"),
        Column("s", ".2f"),
        Column("over eager (range)", align="right"),
        Column("over exact (range)", align="right"),
    )
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))
    assert rows


@pytest.mark.bench
@torch.no_grad()
def test_speed_of_native_decoders_at_full_size() -> None:
    widths = [FULL_WIDTH, *(round(FULL_WIDTH * ratio) for ratio in RATIOS)]
    title = "Native Wan 2.1 decoders, exact operators, 9 frames of 256 x 256"
    printed_speeds(wan_decoder_spec, widths, torch.randn(1, 16, 3, 32, 32), title)


@pytest.mark.bench
@torch.no_grad()
def test_speed_of_native_flux2_decoders() -> None:
    """Widths that `AutoencoderKLFlux2` builds, multiples of its 32 groups; one is the official small decoder's."""
    family = get_family("flux.2")
    widths = [family.released_base_width, FLUX_2_SMALL, family.released_base_width // 2]
    title = "Native FLUX.2 decoders, exact operators, an image of 256 x 256"
    latents = torch.randn(1, family.latent_width, 1, 32, 32)
    printed_speeds(lambda width: family.decoder_spec(width, family.latent_width), widths, latents, title)
