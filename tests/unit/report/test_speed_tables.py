from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from flashvaed_cli.report.evaluation import Spread
from flashvaed_cli.report.speed import (
    SpeedReport,
    SpeedRow,
    SpeedTable,
    all_notes,
    machine_shares,
    machine_table,
    save_speed,
    speed_document,
    speed_markdown,
    speed_tables,
    time_table,
)
from flashvaed_cli.report.tables import to_rich

EAGER = SpeedRow(
    "diffusers, eager", Spread(48.123, 47.0, 50.5), None, Spread(0.25, 0.2, 0.3), 3 * 10**9, 5132.0, 4 * 10**9, 51.0
)
EXACT = SpeedRow(
    "original, exact", Spread(12.0, 11.5, 12.5), Spread(4.01, 3.9, 4.1), None, 2 * 10**9, 4000.0, 4 * 10**9, 60.0, 48.0,
    "exact operators, channels-last, compiled",
)  # fmt: skip
FLASH = SpeedRow(
    "flash", Spread(0.5, 0.48, 0.531), Spread(96.2, 90.0, 110.0), Spread(24.0, 22.0, 26.0), 5 * 10**8, 166.0, 10**9, 1.0
)
LARGE = SpeedRow("large", failure="does not fit")
TABLE = SpeedTable(9, 256, 192, "float32", (EAGER, EXACT, FLASH, LARGE), 166.0, 20.0, "Wan 2.1")


def printed(report: SpeedReport) -> str:
    console = Console(file=io.StringIO(), width=120)
    for table in speed_tables(report):
        console.print(to_rich(table))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_time_table() -> None:
    table = time_table(TABLE)
    assert table.title == "Speed: Wan 2.1, 9 frames of 192×256, float32"
    assert table.texts() == [
        ["diffusers, eager", "48.1 (47.0–50.5)", "0.19", "–", "0.25× (0.20–0.30)"],
        ["original, exact", "12.0 (11.5–12.5)", "0.75", "4.01× (3.90–4.10)", "–"],
        ["flash", "0.500 (0.480–0.531)", "18.00", "96.20× (90.00–110.00)", "24.00× (22.00–26.00)"],
        ["large", "does not fit", "–", "–", "–"],
    ]


def test_machine_table() -> None:
    table = machine_table(TABLE)
    assert table.title.startswith("Machine (matmul 166 GFLOP/s, copy 20.0 GB/s)")
    assert table.texts()[2] == ["flash", "500", "166.0", "332.0", "200.0", "10.0", "1.00", "–"]
    assert table.texts()[3][1:] == ["–"] * 7
    bare = replace(TABLE, matmul_gflop_per_s=None)
    assert machine_table(bare).title == "Machine: Wan 2.1, 9 frames of 192×256, float32"
    assert machine_shares(bare, FLASH)["matmul_percent"] is None


def test_nothing_is_cut_at_120_columns() -> None:
    shown = printed(SpeedReport((TABLE,)))
    assert "…" not in shown
    for table in speed_tables(SpeedReport((TABLE,))):
        for texts in table.texts():
            assert any(all(text in line for text in texts) for line in shown.splitlines())


def test_json_and_markdown(tmp_path: Path) -> None:
    report = SpeedReport((TABLE,), {"device": "cpu"}, ("large is large",))
    paths = save_speed(report, tmp_path / "new")
    document = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert document == speed_document(report)
    assert document["kind"] == "flashvaed-speed" and document["settings"] == {"device": "cpu"}
    eager, _, flash, large = document["tables"][0]["rows"]
    assert flash["seconds"] == {"median": 0.5, "min": 0.48, "max": 0.531, "num_rounds": None}
    assert flash["frames_per_second"] == 18.0 and flash["gflop_per_s"] == 332.0
    assert eager["over_eager"] is None and large["failure"] == "does not fit" and large["matmul_percent"] is None
    text = paths["markdown"].read_text(encoding="utf-8")
    assert text == speed_markdown(report)
    assert text.startswith("# Speed\n\n- device: cpu\n") and "## Speed: Wan 2.1" in text
    assert "- large is large\n" in text and "- original, exact: exact operators, channels-last, compiled\n" in text


def test_ways_that_differ_are_told_apart() -> None:
    other = replace(TABLE, num_frames=81, rows=(replace(EXACT, way="exact operators, chunk 1"),))
    notes = all_notes(SpeedReport((TABLE, other)))
    assert "original, exact, Wan 2.1, 9 frames of 192×256, float32: exact operators, channels-last, compiled" in notes
    assert "original, exact, Wan 2.1, 81 frames of 192×256, float32: exact operators, chunk 1" in notes


def test_figures_that_are_not_finite_are_null() -> None:
    broken = replace(FLASH, seconds=Spread(math.nan, math.inf, math.inf))
    document = speed_document(SpeedReport((replace(TABLE, rows=(broken,)),)))
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123456, "0.0123"), (1.5, "1.50"), (123.456, "123"), (4567.8, "4568")]
)
def test_three_digits(seconds: float, text: str) -> None:
    row = SpeedRow("a", Spread(seconds, seconds, seconds))
    assert time_table(replace(TABLE, rows=(row,))).texts()[0][1] == f"{text} ({text}–{text})"
