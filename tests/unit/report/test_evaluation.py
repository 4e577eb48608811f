from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flashvaed_cli.report.evaluation import (
    ClipFigures,
    DecoderFigures,
    EvaluationReport,
    Spread,
    clip_table,
    differences,
    mean_interval,
    report_markdown,
    retention_percent,
    save_report,
    summary_table,
    to_json,
)
from flashvaed_cli.report.tables import to_rich


@dataclass(frozen=True)
class Figures:
    psnr_db: float = 30.0
    ssim: float | None = 0.9
    lpips: float | None = None
    sharpness_ratio: float | None = 0.8
    flicker: float | None = 0.01
    num_frames: int = 17


def report(**changes: Any) -> EvaluationReport:
    original = DecoderFigures(
        "original",
        to_ground_truth=Figures(),
        frames_per_second=10.0,
        num_parameters=1000,
        file_bytes=4_000_000,
        gflops=31.0,
    )
    flash = DecoderFigures(
        "flash",
        to_ground_truth=Figures(psnr_db=29.07, ssim=0.81, sharpness_ratio=0.72),
        to_original=Figures(psnr_db=math.inf, num_frames=17),
        frames_per_second=80.0,
        speedup=Spread(8.0, 7.5, 8.2),
        num_parameters=100,
    )
    clip = ClipFigures("a.mp4", "flash", 17, 240, 320, flash.to_ground_truth, flash.to_original)
    values: dict[str, Any] = {
        "decoders": (original, flash),
        "clips": (clip,),
        "settings": {"device": "cpu", "rounds": 5},
        "notes": ("LPIPS left out: get the backbone",),
        "files": {"strip": "strip.png", "video": "side by side.mp4"},
    }
    return EvaluationReport(**{**values, **changes})


def reject_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_retention_is_the_ratio_to_the_original() -> None:
    full = report()
    assert retention_percent(full, full.decoders[1]) == pytest.approx(
        {"psnr_db": 96.9, "ssim": 90.0, "sharpness_ratio": 90.0}
    )
    assert retention_percent(full, full.original)["psnr_db"] == 100.0
    assert retention_percent(full, DecoderFigures("x"))["psnr_db"] is None


def test_json_is_valid_and_capped() -> None:
    document = json.loads(to_json(report()), parse_constant=reject_constant)
    flash = document["decoders"][1]
    assert flash["to_original"]["psnr_db"] == document["psnr_cap_db"] == 100.0
    assert flash["to_ground_truth"]["lpips"] is None
    assert flash["retention_percent"]["psnr_db"] == pytest.approx(96.9)
    assert flash["speedup"] == {"median": 8.0, "min": 7.5, "max": 8.2, "num_rounds": None}
    assert flash["frame_ms"] == 12.5
    assert document["clips"][0]["clip"] == "a.mp4"
    assert document["notes"] == ["LPIPS left out: get the backbone"]
    assert document["settings"] == {"device": "cpu", "rounds": 5}


def test_json_of_broken_figures_is_valid() -> None:
    broken = DecoderFigures("broken", to_ground_truth=Figures(psnr_db=math.nan, ssim=math.nan))
    document = json.loads(to_json(report(decoders=(broken,), settings={"x": math.inf})), parse_constant=reject_constant)
    assert document["decoders"][0]["to_ground_truth"]["psnr_db"] is None
    assert document["settings"] == {"x": None}


def test_summary_has_a_row_per_known_figure() -> None:
    rows = {str(row[0]): row[1:] for row in summary_table(report()).rows}
    assert rows["PSNR to the video, dB"] == ("30.00", "29.07")
    assert rows["PSNR to the original, dB"] == (None, "100.00")
    assert rows["PSNR kept, %"] == ("100.0", "96.9")
    assert rows["speed-up"] == (None, "8.00×")
    assert rows["speed-up, range of rounds"] == (None, "7.5–8.2")
    assert rows["file, MB"] == ("4.00", None)
    assert not any("LPIPS" in label or "memory" in label for label in rows)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_summary_of_five_decoders_fits_a_terminal(columns: int) -> None:
    """Labels and figures stay whole; only names may break over lines."""
    figures = report().decoders[1]
    names = ("original, exact", "flash", "converted", "cut")
    decoders = (report().decoders[0], *(replace(figures, name=name) for name in names))
    table = summary_table(report(decoders=decoders, clips=()))
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(to_rich(table))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= columns and "…" not in shown
    for label, *cells in table.texts():
        line = next(line for line in shown.splitlines() if f" {label} " in line)
        assert all(cell in line for cell in cells)


def test_clip_table() -> None:
    assert clip_table(report()).texts() == [
        ["a.mp4", "17", "320×240", "flash", "29.07", "0.8100", "–", "0.720", "100.00"]
    ]


def test_markdown_holds_everything() -> None:
    text = report_markdown(report(), title="Flash")
    assert text.startswith("# Flash\n\n- device: cpu\n")
    for part in ("| PSNR kept, %", "## Clips", "## Notes\n\n- LPIPS left out", "![strip](<strip.png>)"):
        assert part in text
    assert "- [video](<side by side.mp4>)" in text
    bare = report_markdown(EvaluationReport((DecoderFigures("only"),)))
    assert "## Notes" not in bare
    assert "## Clips" not in bare


def test_saved_files(tmp_path: Path) -> None:
    paths = save_report(report(), tmp_path / "new")
    assert json.loads(paths["json"].read_text())["kind"] == "flashvaed-evaluation"
    assert paths["markdown"].read_text() == report_markdown(report())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="different names"):
        EvaluationReport((DecoderFigures("a"), DecoderFigures("a")))
    with pytest.raises(ValueError, match="different names"):
        EvaluationReport(())


def clips_of(decoder: str, decibels: list[float]) -> tuple[ClipFigures, ...]:
    return tuple(ClipFigures(f"{i}.mp4", decoder, 5, 8, 8, None, Figures(psnr)) for i, psnr in enumerate(decibels))


def test_students_are_compared_clip_by_clip() -> None:
    """Clips differ by 20 dB and the decoders by about 1: paired, that is certain, and unpaired it is not."""
    decibels = [20.0, 25.0, 30.0, 35.0, 40.0]
    one, other = Figures(30.0), Figures(31.0)
    full = report(
        decoders=(DecoderFigures("original"), DecoderFigures("a", None, one), DecoderFigures("b", None, other)),
        clips=(*clips_of("a", decibels), *clips_of("b", [d + 1 + 0.1 * (d > 30) for d in decibels])),
    )
    (found,) = (entry for entry in differences(full) if entry["figure"] == "psnr_db")
    assert found["mean"] == pytest.approx(1.04) and (found["decoder"], found["than"]) == ("b", "a")
    low, high = found["interval_95"]  # type: ignore[misc]
    assert 1 <= low < 1.04 < high <= 1.1
    interval = mean_interval(full, "b", "to_original", "psnr_db")
    assert interval is not None and interval[1] - interval[0] > 5
    document = json.loads(to_json(full))
    assert document["decoders"][1]["to_original"]["num_clips"] == 5
    assert document["decoders"][1]["to_original"]["interval_95"]["psnr_db"][0] < 30
    assert "## Differences to a, clip by clip" in report_markdown(full)
    assert differences(report()) == []


def test_a_single_round_has_no_range() -> None:
    decoders = (report().decoders[0], replace(report().decoders[1], speedup=Spread(8.0, 8.0, 8.0, num_rounds=1)))
    rows = {str(row[0]): row[1:] for row in summary_table(report(decoders=decoders)).rows}
    assert rows["rounds of timing"] == (None, "1") and not any("range" in label for label in rows)
