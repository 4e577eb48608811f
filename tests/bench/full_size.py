"""Decoders to measure, with random weights: what a layer costs does not depend on them."""

from __future__ import annotations

import os

import torch
from rich.console import Console

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.wan21.spec import WAN21, wan_decoder_spec
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.report.speed import SpeedReport, SpeedTable, all_notes, speed_tables
from flashvaed_cli.report.tables import to_rich
from flashvaed_cli.stages.speed.run import device_with_threads
from flashvaed_cli.stages.speed.table import SpeedSettings, TimedSize, time_decoders
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec


def setting(name: str, default: int) -> int:
    """`FLASHVAED_BENCH_NAME` of the environment."""
    return int(os.environ.get(f"FLASHVAED_BENCH_{name}", default))


def paper_layout(base_width: int, keep_ratio: float) -> DecoderSpec:
    """What `convert-ops` and `prune --ratio` make of Wan 2.1, without weights."""
    return flash_layout(wan_decoder_spec(base_width), WAN21, keep_ratio)


def flash_layout(original: DecoderSpec, family: Family, keep_ratio: float) -> DecoderSpec:
    """What they make of an original: the family's operators, and so much of its shallow stages."""
    spec = converted_spec(original, family.paper_operators)
    groups = [group for group in channel_groups(spec) if group.stage in family.shallow_stages]
    kept = {tensor: tuple(range(round(group.width * keep_ratio))) for group in groups for tensor in group.tensors}
    return narrowed_spec(spec, kept)


def random_decoder(spec: DecoderSpec, device: str) -> Decoder:
    """A decoder with random weights."""
    with torch.device(device):
        return Decoder(spec).eval().requires_grad_(False)


def print_speed(
    base_width: int, flash: str, size: TimedSize, settings: SpeedSettings, *, label: str, device: str = "cpu"
) -> SpeedTable:
    """Time the original of a base width and its paper layout, and print both tables.

    Args:
        flash: what to call the paper's layout.
        label: in the titles.
    """
    torch.manual_seed(0)
    original = random_decoder(wan_decoder_spec(base_width), device)
    derived = {flash: random_decoder(paper_layout(base_width, 0.125), device)}
    place = torch.device(device)
    table, notes = time_decoders(original, derived, size, settings, place, progress=SilentProgress(), label=label)
    report = SpeedReport((table,), {}, (f"{device_with_threads(place)}, torch {torch.__version__}", *notes))
    console = Console(width=120)
    for view in speed_tables(report):
        console.print(to_rich(view))
    for note in all_notes(report):
        console.print(note, markup=False, highlight=False)
    return table
