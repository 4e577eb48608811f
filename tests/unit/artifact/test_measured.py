"""What a command leaves in the header is what the next one reads, and what is damaged is no record."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flashvaed_cli.artifact.header import ArtifactHeader, dump_header, parse_header
from flashvaed_cli.artifact.measured import AnalysisRecord, ConversionRecord, DistillRecord, PruneRecord, Record

POSITIONS = {"positions": {"up0.0": 12}}
PRUNED = {"selection": [], "parameters_before": 10, "parameters_after": 5}
CONVERTED = {"operators": {}, "gflop_9x256x256_before": 2.0, "gflop_9x256x256_after": 1.0}
TRAINED = {"phases": [{"phase": 3, "num_steps": 2, "seconds": 1.5, "history": [{"step": 1, "psnr_db": None}]}]}
RECORDS: list[tuple[type[Record], dict[str, Any]]] = [
    (AnalysisRecord, {"clips": POSITIONS}),
    (PruneRecord, PRUNED),
    (ConversionRecord, CONVERTED),
    (DistillRecord, TRAINED),
]


def header(measured: dict[str, Any]) -> ArtifactHeader:
    return ArtifactHeader(kind="decoder", family="wan2.1", latent_mean=(), latent_std=(), measured=measured)


@pytest.mark.parametrize(("kind", "measured"), RECORDS)
def test_a_record_gives_the_json_that_it_was_read_from(kind: type[Record], measured: dict[str, Any]) -> None:
    record = kind.of(header(measured))
    assert record is not None
    assert parse_header(dump_header(header(record.as_json())), "a").measured == measured


@pytest.mark.parametrize(("kind", "measured"), RECORDS)
def test_records_of_other_commands_are_none(kind: type[Record], measured: dict[str, Any]) -> None:
    assert [one for one, _ in RECORDS if one.of(header(measured)) is not None] == [kind]
    assert kind.of(None) is None


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert PruneRecord.of(header({**PRUNED, "later": 1})) == PruneRecord.of(header(PRUNED))


@pytest.mark.parametrize(
    "damage",
    [{"parameters_after": "few"}, {"selection": 3}, {"selection": [{"group": "up0.stream"}]}, {"budget": {"side": 1}}],
)
def test_damaged_ones_are_none(damage: dict[str, Any]) -> None:
    assert PruneRecord.of(header({**PRUNED, **damage})) is None


def test_what_is_not_finite_is_read_back_as_nan() -> None:
    group = {"group": "up0.stream", "width": 4, "kept": (0, 1), "r2": math.nan}
    record = PruneRecord.of(header({**PRUNED, "selection": [group]}))
    assert record is not None
    assert math.isnan(record.selection[0].r2)


def test_an_absent_part_is_left_out_of_the_json() -> None:
    record = PruneRecord(selection=(), parameters_before=10, parameters_after=5, budget=None, held_out=None)
    assert record.as_json() == {
        **{k: v for k, v in PRUNED.items() if k != "selection"},
        "selection": (),
        "held_out": None,
    }
