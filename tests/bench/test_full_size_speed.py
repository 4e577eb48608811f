"""Full-size Wan 2.1, random weights: the paper's layout against the original, timed in alternation.

Prints a table. `FLASHVAED_BENCH_SIDE` and `FLASHVAED_BENCH_FRAMES` change the size, `FLASHVAED_BENCH_ROUNDS`
the number of rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.cost import total_gflop
from flashvaed_cli.decoders.groups import channel_groups
from flashvaed_cli.decoders.layout import channels_last, use_channels_last
from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.decoders.wan import WAN21, wan_decoder_spec
from flashvaed_cli.metrics.speed import speed_ratio, time_alternating
from flashvaed_cli.report.tables import Column, TableData, to_rich
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec

SIDE = int(os.environ.get("FLASHVAED_BENCH_SIDE", "256"))
FRAMES = int(os.environ.get("FLASHVAED_BENCH_FRAMES", "9"))
ROUNDS = int(os.environ.get("FLASHVAED_BENCH_ROUNDS", "2"))


def paper_layout(base_width: int, keep_ratio: float) -> DecoderSpec:
    """What `convert-ops` and `prune --ratio` make of the original, without weights."""
    spec = converted_spec(wan_decoder_spec(base_width), WAN21.paper_operators)
    groups = [group for group in channel_groups(spec) if group.stage in WAN21.shallow_stages]
    kept = {tensor: tuple(range(round(group.width * keep_ratio))) for group in groups for tensor in group.tensors}
    return narrowed_spec(spec, kept)


@pytest.mark.bench
@torch.no_grad()
def test_paper_layout_against_the_original() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the tests run on one
    torch.manual_seed(0)
    grid = (1 + (FRAMES - 1) // 4, SIDE // 8, SIDE // 8)
    latents = torch.randn(1, 16, *grid)
    packed = channels_last(latents)
    original, tuned = Decoder(wan_decoder_spec(96)).eval(), use_channels_last(Decoder(wan_decoder_spec(96)).eval())
    flash = use_channels_last(Decoder(paper_layout(96, 0.125)).eval())
    decoders = {"original, eager": original, "original, channels-last": tuned, "flash (384/24/12)": flash}
    calls: dict[str, Callable[[], object]] = {
        "original, eager": lambda: original(latents),
        "original, channels-last": lambda: tuned(packed),
        "flash (384/24/12)": lambda: flash(packed),
    }
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError:
        pass
    else:
        reference = AutoencoderKLWan(base_dim=96).eval()
        calls = {"diffusers, eager": lambda: reference.decode(latents), **calls}
    results = time_alternating(calls, num_warmup=1, num_rounds=ROUNDS)
    baseline = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        decoder = decoders.get(name, original)
        ratio = speed_ratio(baseline, result)
        rows.append(
            (
                name,
                result.median,
                FRAMES / result.median,
                total_gflop(decoder.spec, grid),
                decoder.parameter_count,
                f"{ratio.median:.1f} ({ratio.min:.1f} to {ratio.max:.1f})",
            )
        )
    columns = (
        Column("decoder", align="left"),
        Column("s", ".2f"),
        Column("frames/s", ".2f"),
        Column("GFLOP", ".0f"),
        Column("parameters", ",d"),
        Column("speed-up (range)"),
    )
    size = f"{FRAMES} frames of {SIDE} x {SIDE}, float32, {torch.get_num_threads()} threads"
    title = f"Wan 2.1 full size, random weights, {size}"
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))
    assert flash.parameter_count < original.parameter_count / 10
