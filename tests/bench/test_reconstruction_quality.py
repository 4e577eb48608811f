"""What the closed form gains, and which rule chooses best: PSNR to the original's output, with no training.

Prints two tables for `builtin:tiny-wan`, on clips that no fit has seen. See `quality_data.py` for the clips;
`FLASHVAED_BENCH_SEEDS` is the number of random sets.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping

import pytest
import torch
from rich.console import Console

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import Kept
from flashvaed_cli.families.wan21.spec import WAN21
from flashvaed_cli.numerics.selection import SELECTION_RULES
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.bench.quality_data import QualityData, load_quality_data

SEEDS = int(os.environ.get("FLASHVAED_BENCH_SEEDS", "5"))
DEFAULT_RULE = str(PruneRecipe.model_fields["rule"].default)
RATIOS = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
PAPER = WAN21.paper_operators


@pytest.fixture(scope="module")
def data() -> QualityData:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the tests run on one
    return load_quality_data()


@pytest.fixture(scope="module")
def statistics_of(data: QualityData) -> Mapping:
    decoder = data.vae.require_decoder()
    return collect_statistics(decoder, data.calibration, num_clips=None, progress=SilentProgress())


def solved(data: QualityData, spec: DecoderSpec, kept: Kept, mode: str) -> tuple[Decoder, Decoder]:
    """The decoder with cut weights, and with solved ones."""
    original = data.vae.require_decoder()
    cut, student = transfer_weights(original, spec, kept), transfer_weights(original, spec, kept)
    first = first_changed_block(original, student)
    assert first is not None
    settings = FitSettings(mode="channel" if mode == "channel" else "full")
    reconstruct_coder(
        original, student, kept, data.calibration, first_block=first, settings=settings, progress=SilentProgress()
    )
    return cut, student


def choose(data: QualityData, statistics_of: Mapping, ratio: float, rule: str, seed: int = 0) -> Kept:
    decoder = data.vae.require_decoder()
    ratios = dict.fromkeys(WAN21.shallow_stages, ratio)
    return select_channels(decoder, statistics_of, ratios, rule=rule, seed=1000 * seed)[0]


def show(title: str, columns: tuple[Column, ...], rows: list[tuple[Cell, ...]]) -> None:
    Console(width=120).print(to_rich(TableData(title, columns, tuple(rows))))


@pytest.mark.bench
def test_reconstruction_against_cut_weights(data: QualityData, statistics_of: Mapping) -> None:
    spec = data.vae.require_decoder().spec
    cases: dict[str, tuple[DecoderSpec, Kept]] = {}
    for name, ratio in RATIOS.items():
        kept = choose(data, statistics_of, ratio, DEFAULT_RULE)
        cases[f"prune up2, up3 to {name}"] = (narrowed_spec(spec, kept), kept)
    cases["the paper's operators"] = (converted_spec(spec, PAPER), {})
    for name in RATIOS:
        narrow, kept = cases[f"prune up2, up3 to {name}"]
        cases[f"the paper's operators and {name}"] = (converted_spec(narrow, PAPER), kept)
    rows: list[tuple[Cell, ...]] = []
    gains: list[float] = []
    for name, (changed, kept) in cases.items():
        cut, full = solved(data, changed, kept, "full")
        _, channel = solved(data, changed, kept, "channel")
        before, light, after = data.psnr(cut), data.psnr(channel), data.psnr(full)
        rows.append((name, before, light, after, after - before))
        gains.append(after - before)
        print(rows[-1], flush=True)
    columns = (
        Column("change", align="left"),
        Column("cut, dB", ".2f"),
        Column("channel, dB", ".2f"),
        Column("full, dB", ".2f"),
        Column("gain, dB", "+.2f"),
    )
    show(f"PSNR to the original's output, no training; {data.source}", columns, rows)
    assert gains and min(gains) > 0.0


@pytest.mark.bench
def test_selection_rules(data: QualityData, statistics_of: Mapping) -> None:
    spec = data.vae.require_decoder().spec
    rows: list[tuple[Cell, ...]] = []
    for rule in SELECTION_RULES:
        cells: list[Cell] = [rule]
        for ratio in RATIOS.values():
            values = []
            for seed in range(SEEDS if rule == "random" else 1):
                kept = choose(data, statistics_of, ratio, rule, seed)
                values.append(data.psnr(solved(data, narrowed_spec(spec, kept), kept, "full")[1]))
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        rows.append(tuple(cells))
        print(rows[-1], flush=True)
    columns = (Column("rule", align="left"), *(Column(f"{name}, dB") for name in RATIOS))
    show(f"The same reconstruction of sets chosen by each rule; {data.source}", columns, rows)
    assert len(rows) == len(SELECTION_RULES)
