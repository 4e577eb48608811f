"""Speed tables: what `eval --speed` and `make bench` measured, as data, JSON, Markdown and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.printable import counted
from flashvaed_cli.report.evaluation import Spread
from flashvaed_cli.report.pipeline import PipelineShare
from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown

SCHEMA = 1
SPEED_JSON, SPEED_MARKDOWN = "speed.json", "speed.md"


@dataclass(frozen=True)
class SpeedRow:
    """One decoder at one size. None: not measured, or not defined (a baseline against itself).

    Attributes:
        name: as shown; unique in a table.
        seconds: of one decoding of the whole clip.
        over_eager: how many times faster than the table's first row that was timed, round by round.
        over_exact: the same against the tuned exact original.
        peak_bytes: the decoder's weights and what memory grows by while it decodes.
        gflop: of the whole clip; a multiply-add counts as 2.
        traffic_bytes: the least that must be read and written, see `metrics.roofline.traffic_elements`.
        cold_start_s: preparation and the first call, compilation included.
        compile_s: how much longer a compiled decoder's cold start took than a warm call.
        way: how it was run (layout, chunk, tile, compiled).
        failure: why there are no figures.
        pipeline: what its speed means for a whole pipeline.
    """

    name: str
    seconds: Spread | None = None
    over_eager: Spread | None = None
    over_exact: Spread | None = None
    peak_bytes: int | None = None
    gflop: float | None = None
    traffic_bytes: int | None = None
    cold_start_s: float | None = None
    compile_s: float | None = None
    way: str = ""
    failure: str | None = None
    pipeline: PipelineShare | None = None


@dataclass(frozen=True)
class SpeedTable:
    """All decoders at one size.

    Attributes:
        rows: the eager baseline first.
        matmul_gflop_per_s, copy_gbyte_per_s: the machine's rates, measured in the same run.
    """

    num_frames: int
    height: int
    width: int
    dtype: str
    rows: tuple[SpeedRow, ...]
    matmul_gflop_per_s: float | None = None
    copy_gbyte_per_s: float | None = None
    label: str = ""

    @property
    def title(self) -> str:
        """Label, size and dtype."""
        size = f"{counted(self.num_frames, 'frame')} of {self.width}×{self.height}, {self.dtype}"
        return f"{self.label}, {size}" if self.label else size


@dataclass(frozen=True)
class SpeedReport:
    """The tables of one run.

    Attributes:
        settings: how it was measured (device, rounds, command), shown as given.
        notes: what changes the meaning of a figure.
    """

    tables: tuple[SpeedTable, ...]
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def time_table(table: SpeedTable) -> TableData:
    """How fast: seconds, frames per second, speed-ups with their ranges."""
    columns = (
        Column("decoder", align="left"),
        Column("s (range)"),
        Column("frames/s", ".2f"),
        Column("× eager (range)"),
        Column("× exact (range)"),
    )
    rows = tuple(
        (
            row.name,
            row.failure if row.seconds is None else _spread_text(row.seconds),
            table.num_frames / row.seconds.median if row.seconds else None,
            _ratio_text(row.over_eager),
            _ratio_text(row.over_exact),
        )
        for row in table.rows
    )
    return TableData(f"Speed: {table.title}", columns, rows)


def pipeline_table(table: SpeedTable) -> TableData | None:
    """What it means for a whole pipeline; None if the time of the rest is not given."""
    shares = [(row.name, row.pipeline) for row in table.rows if row.pipeline is not None]
    if not shares:
        return None
    columns = (
        Column("decoder", align="left"),
        Column("decoding, s", ".2f"),
        Column("whole, s", ".2f"),
        Column("decoding's share, %", ".1f"),
        Column("× whole", ".2f"),
    )
    rows = tuple((name, share.decode_s, share.total_s, share.decoding_percent, share.speedup) for name, share in shares)
    return TableData(f"Pipeline whose other steps take {shares[0][1].rest_s:g} s: {table.title}", columns, rows)


def machine_table(table: SpeedTable) -> TableData:
    """What it takes: memory, operations, the share of the machine's rates that it reaches, and start-up time."""
    columns = (
        Column("decoder", align="left"),
        Column("peak, MB", ",.0f"),
        Column("GFLOP", ",.1f"),
        Column("GFLOP/s", ",.1f"),
        Column("% of matmul", ".1f"),
        Column("% of copy", ".1f"),
        Column("cold start, s", ".2f"),
        Column("compile, s", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for row in table.rows:
        shares = machine_shares(table, row)
        rows.append(
            (
                row.name,
                None if row.peak_bytes is None else row.peak_bytes / 1e6,
                row.gflop,
                shares["gflop_per_s"],
                shares["matmul_percent"],
                shares["copy_percent"],
                row.cold_start_s,
                row.compile_s,
            )
        )
    return TableData(_machine_title(table), columns, tuple(rows))


def _machine_title(table: SpeedTable) -> str:
    if table.matmul_gflop_per_s is None or table.copy_gbyte_per_s is None:
        return f"Machine: {table.title}"
    rates = f"matmul {table.matmul_gflop_per_s:,.0f} GFLOP/s, copy {table.copy_gbyte_per_s:,.1f} GB/s"
    return f"Machine ({rates}): {table.title}"


def machine_shares(table: SpeedTable, row: SpeedRow) -> dict[str, float | None]:
    """Achieved operations per second, and as a share of the machine's matmul and copy rates."""

    def per_second(amount: float | None) -> float | None:
        return amount / row.seconds.median if amount is not None and row.seconds else None

    gflop_per_s, bytes_per_s = per_second(row.gflop), per_second(row.traffic_bytes)
    return {
        "gflop_per_s": gflop_per_s,
        "matmul_percent": _percent(gflop_per_s, table.matmul_gflop_per_s),
        "copy_percent": _percent(bytes_per_s and bytes_per_s / 1e9, table.copy_gbyte_per_s),
    }


def _percent(value: float | None, whole: float | None) -> float | None:
    return 100 * value / whole if value is not None and whole else None


def way_notes(report: SpeedReport) -> tuple[str, ...]:
    """How every decoder was run, said once if it is the same in all tables."""
    ways: dict[str, dict[str, str]] = {}
    for table in report.tables:
        for row in table.rows:
            if row.way:
                ways.setdefault(row.name, {})[table.title] = row.way
    notes: list[str] = []
    for name, by_table in ways.items():
        if len(set(by_table.values())) == 1:
            notes.append(f"{name}: {next(iter(by_table.values()))}")
        else:
            notes += [f"{name}, {title}: {way}" for title, way in by_table.items()]
    return tuple(notes)


def all_notes(report: SpeedReport) -> tuple[str, ...]:
    """What every reader needs to know, then how the decoders were run, then what is special about this run."""
    return (*_LEGEND, *way_notes(report), *report.notes)


_LEGEND = (
    "s, frames/s and speed-ups are medians over rounds in which all decoders take turns; in brackets the range.",
    "× eager is against the first row that was timed, × exact against the original with exact operators.",
    "Peak: the weights and what one warm decoding adds. % of copy: the least traffic possible, every layer reading "
    "its input and writing its output once. Cold start: preparation and the first call, in a process already warm.",
)


def speed_tables(report: SpeedReport) -> tuple[TableData, ...]:
    """Two tables per size, and a third if the rest of the pipeline is known."""
    views = (time_table, pipeline_table, machine_table)
    tables = (view(table) for table in report.tables for view in views)
    return tuple(table for table in tables if table is not None)


def speed_document(report: SpeedReport) -> dict[str, object]:
    """All figures as plain data; non-finite ones become None."""
    return {
        "kind": "flashvaed-speed",
        "schema": SCHEMA,
        "settings": {key: _plain(value) for key, value in report.settings.items()},
        "tables": [_table_document(table) for table in report.tables],
        "notes": list(all_notes(report)),
    }


def _table_document(table: SpeedTable) -> dict[str, object]:
    head = {key: _plain(value) for key, value in vars(table).items() if key != "rows"}
    rows = []
    for row in table.rows:
        figures = {key: _plain(value) for key, value in asdict(row).items()}
        figures["pipeline"] = row.pipeline and row.pipeline.as_dict()
        fps = table.num_frames / row.seconds.median if row.seconds else None
        shares = {key: _plain(value) for key, value in machine_shares(table, row).items()}
        rows.append({**figures, "frames_per_second": _plain(fps), **shares})
    return {**head, "rows": rows}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def speed_markdown(report: SpeedReport, *, title: str = "Speed") -> str:
    """The whole report for GitHub."""
    parts = [f"# {title}\n"]
    if report.settings:
        parts.append("".join(f"- {key}: {value}\n" for key, value in report.settings.items()))
    parts += [to_markdown(table) for table in speed_tables(report)]
    parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in all_notes(report)))
    return "\n".join(parts)


def save_speed(report: SpeedReport, folder: Path) -> dict[str, Path]:
    """Write `speed.json` and `speed.md`, each atomically. Returns the paths by kind."""
    paths = {"json": folder / SPEED_JSON, "markdown": folder / SPEED_MARKDOWN}
    document = json.dumps(speed_document(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for kind, text in (("markdown", speed_markdown(report)), ("json", document)):
        with atomic_path(paths[kind]) as sibling:
            sibling.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    return paths


def _spread_text(spread: Spread) -> str:
    return f"{_digits(spread.median)} ({_digits(spread.min)}–{_digits(spread.max)})"


def _digits(seconds: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}" if seconds > 0 else "0"


def _ratio_text(ratio: Spread | None) -> str | None:
    return None if ratio is None else f"{ratio.median:.2f}× ({ratio.min:.2f}–{ratio.max:.2f})"
