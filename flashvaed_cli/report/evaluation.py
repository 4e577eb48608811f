"""What `eval` found, as data, JSON, Markdown and tables.

JSON holds plain numbers only: an infinite PSNR (identical clips) is written as `PSNR_CAP_DB`, any
other non-finite number as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.numerics.bootstrap import bootstrap_interval, bootstrap_mean_interval
from flashvaed_cli.report.figures import FIGURES, PSNR_CAP_DB, RETENTION, Figure
from flashvaed_cli.report.pipeline import PipelineShare
from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown

SCHEMA = 2
REPORT_JSON = "report.json"


@runtime_checkable
class Quality(Protocol):
    """The `FIGURES` of one decoder against one reference, as attributes of the same names; None if
    one is not defined."""

    @property
    def psnr_db(self) -> float: ...
    @property
    def num_frames(self) -> int: ...


@dataclass(frozen=True)
class Spread:
    """A measured ratio over rounds; None if the number of rounds is not known."""

    median: float
    min: float
    max: float
    num_rounds: int | None = None


@dataclass(frozen=True)
class FrechetDistances:
    """Between the features of a decoder's output and of each reference; None if there is no such reference."""

    to_ground_truth: float | None
    to_original: float | None
    num_samples: int
    num_features: int


@dataclass(frozen=True)
class GateVerdict:
    """Whether a condition holds.

    Attributes:
        condition: as it was given.
        decoder: whose figure it is about.
        value: of the figure; None if it was not measured, which counts as failed.
    """

    condition: str
    decoder: str
    value: float | None
    passed: bool

    @property
    def text(self) -> str:
        """The condition and the value found."""
        found = "was not measured" if self.value is None else f"is {self.value:.6g}"
        return f"{self.condition}: for {self.decoder} it {found}"


@dataclass(frozen=True)
class DecoderFigures:
    """One decoder over all clips. None: not measured, or not defined (the original against itself).

    Args:
        name: as shown; unique in a report.
        to_ground_truth: mean over clips, against the videos.
        to_original: mean over clips, against the original decoder's output.
        frames_per_second: decoding only.
        speedup: frames per second over the original's, round by round.
        num_parameters: of the decoder.
        file_bytes: of its weights on disk.
        gflops: per decoded frame; a multiply-add counts as 2.
        peak_memory_bytes: while decoding.
        frechet: over all clips together.
        pipeline: what its speed means for a whole pipeline.
        shape: of a light decoder; None: the family's own blocks.
    """

    name: str
    to_ground_truth: Quality | None = None
    to_original: Quality | None = None
    frames_per_second: float | None = None
    speedup: Spread | None = None
    num_parameters: int | None = None
    file_bytes: int | None = None
    gflops: float | None = None
    peak_memory_bytes: int | None = None
    frechet: FrechetDistances | None = None
    pipeline: PipelineShare | None = None
    shape: str | None = None

    @property
    def frame_ms(self) -> float | None:
        """Milliseconds per decoded frame."""
        return 1e3 / self.frames_per_second if self.frames_per_second else None


@dataclass(frozen=True)
class ClipFigures:
    """One decoder on one clip."""

    clip: str
    decoder: str
    num_frames: int
    height: int
    width: int
    to_ground_truth: Quality | None = None
    to_original: Quality | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """All that `eval` found.

    Args:
        decoders: the original first; retention and speed-up are measured against it.
        clips: rows per clip and decoder.
        settings: how it was measured (device, dtype, rounds, command), shown as given.
        notes: what changes the meaning of a figure (LPIPS absent and how to get it, skipped clips).
        files: what else was written (pictures, videos), by name.
        gates: the conditions that were set.
        made_with: settings, inputs and data, from which a later run can tell whether anything has changed.
    """

    decoders: tuple[DecoderFigures, ...]
    clips: tuple[ClipFigures, ...] = ()
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[GateVerdict, ...] = ()
    made_with: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a report without decoders, or with two of the same name."""
        names = [decoder.name for decoder in self.decoders]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a report needs decoders with different names, not {names}")

    @property
    def original(self) -> DecoderFigures:
        """The decoder that the others are measured against."""
        return self.decoders[0]


def retention_percent(report: EvaluationReport, decoder: DecoderFigures) -> dict[str, float | None]:
    """Share of the original's quality against ground truth that a decoder keeps.

    `psnr_db` is the ratio of decibels, as in the paper; `ssim` the ratio of SSIM; `sharpness_ratio`
    the ratio of Laplacian energies, so 100 % means as sharp as the original decoder.

    Reference: arXiv 2602.19161, section 4 (the "96.9 % of the quality").
    """
    kept: dict[str, float | None] = {}
    for name in RETENTION:
        own, original = (figure_of(figures.to_ground_truth, name) for figures in (decoder, report.original))
        kept[name] = 100 * own / original if own is not None and original else None
    return kept


def kept_interval(report: EvaluationReport, decoder: DecoderFigures) -> tuple[float, float] | None:
    """The 95 % interval of `retention_percent`'s `psnr_db`, resampled over clips; None for fewer than three.

    The decoder and the original are resampled together, so that differences between clips do not widen it.
    """
    pairs: dict[str, dict[str, float]] = {}
    for row in report.clips:
        value = figure_of(row.to_ground_truth, "psnr_db")
        if value is not None:
            pairs.setdefault(row.clip, {})[row.decoder] = value
    both = [(pair[decoder.name], pair[report.original.name]) for pair in pairs.values() if decoder.name in pair]

    def share(sample: Sequence[tuple[float, float]]) -> float:
        return 100 * math.fsum(own for own, _ in sample) / math.fsum(original for _, original in sample)

    return bootstrap_interval(both, share)


def clip_values(report: EvaluationReport, decoder: str, reference: str, name: str) -> dict[str, float]:
    """A decoder's figure by clip, for the clips on which it is defined.

    Args:
        reference: `to_ground_truth` or `to_original`.
        name: of one of `FIGURES`.
    """
    rows = (row for row in report.clips if row.decoder == decoder)
    values = {row.clip: figure_of(getattr(row, reference), name) for row in rows}
    return {clip: value for clip, value in values.items() if value is not None and math.isfinite(value)}


def mean_interval(report: EvaluationReport, decoder: str, reference: str, name: str) -> tuple[float, float] | None:
    """The 95 % interval of a mean over clips, resampled over them; None for fewer than three, and for the worst frame,
    which is not a mean."""
    if name == "worst_frame_psnr_db":
        return None
    return bootstrap_mean_interval(list(clip_values(report, decoder, reference, name).values()))


def differences(report: EvaluationReport) -> list[dict[str, object]]:
    """How far every further student's figures against the original differ from the first's: the mean of the per-clip
    differences with its 95 % interval, which variation between clips does not widen."""
    found: list[dict[str, object]] = []
    students = [decoder.name for decoder in report.decoders[1:] if decoder.to_original is not None]
    for other in students[1:]:
        for figure in FIGURES:
            ours, theirs = (clip_values(report, one, "to_original", figure.name) for one in (students[0], other))
            pairs = [theirs[clip] - ours[clip] for clip in ours if clip in theirs]
            if pairs:
                entry = {"decoder": other, "than": students[0], "figure": figure.name, "num_clips": len(pairs)}
                found.append(
                    {**entry, "mean": math.fsum(pairs) / len(pairs), "interval_95": bootstrap_mean_interval(pairs)}
                )
    return found


def summary_table(report: EvaluationReport, *, full: bool = False) -> TableData:
    """One row per figure, one column per decoder, so that it fits a terminal however many figures there are.

    Args:
        full: include minor figures, and the intervals of the means.
    """
    columns = (
        Column("", align="left", wraps=False),
        *(Column(decoder.name, wraps=True) for decoder in report.decoders),
    )
    kept = [retention_percent(report, decoder) for decoder in report.decoders]
    rows: list[tuple[Cell, ...]] = []

    def add(label: str, number_format: str, values: list[float | int | None]) -> None:
        if any(value is not None for value in values):
            rows.append((label, *(_text(value, number_format) for value in values)))

    for reference, to in (("to_ground_truth", "to the video"), ("to_original", "to the original")):
        for figure in FIGURES:
            if not (full or figure.is_main):
                continue
            values = [figure_of(getattr(decoder, reference), figure.name) for decoder in report.decoders]
            label = figure.label.format(to=to)
            add(label if to in label else f"{label}, {to}", figure.number_format, values)
            if full and (shown := _interval_texts(report, reference, figure)):
                rows.append(("95 % interval of it", *shown))
    for reference, to in (("to_ground_truth", "to the video"), ("to_original", "to the original")):
        values = [decoder.frechet and getattr(decoder.frechet, reference) for decoder in report.decoders]
        add(f"Fréchet distance {to}", ".3f", values)
    add("PSNR kept, %", ".1f", [share["psnr_db"] for share in kept])
    add("SSIM kept, %", ".1f", [share["ssim"] for share in kept])
    add("sharpness kept, %", ".1f", [share["sharpness_ratio"] for share in kept])
    add("frames per second", ".2f", [decoder.frames_per_second for decoder in report.decoders])
    add("ms per frame", ".2f", [decoder.frame_ms for decoder in report.decoders])
    if any(decoder.speedup for decoder in report.decoders):
        rows.append(("speed-up", *(_speedup_text(decoder.speedup) for decoder in report.decoders)))
        ranges = [_range_text(decoder.speedup) for decoder in report.decoders]
        counts = {decoder.speedup.num_rounds or 0 for decoder in report.decoders if decoder.speedup} - {0}
        if any(ranges):
            rows.append((f"its range in {max(counts)} rounds" if counts else "speed-up, range of rounds", *ranges))
        elif counts:
            rows.append(("rounds of timing", *("1" if decoder.speedup else None for decoder in report.decoders)))
    pipelines = [decoder.pipeline for decoder in report.decoders]
    add("whole pipeline, s", ".1f", [one and one.total_s for one in pipelines])
    add("decoding's share of it, %", ".1f", [one and one.decoding_percent for one in pipelines])
    add("times as fast as a whole", ".2f", [one and one.speedup for one in pipelines])
    if any(decoder.shape for decoder in report.decoders):
        rows.append(("shape, of a light decoder", *(decoder.shape for decoder in report.decoders)))
    add("parameters, million", ".3f", [_scaled(decoder.num_parameters, 1e6) for decoder in report.decoders])
    add("file, MB", ".2f", [_scaled(decoder.file_bytes, 1e6) for decoder in report.decoders])
    add("GFLOPs per frame", ".2f", [decoder.gflops for decoder in report.decoders])
    add("peak memory, MB", ".0f", [_scaled(decoder.peak_memory_bytes, 1e6) for decoder in report.decoders])
    return TableData("Decoders", columns, tuple(rows))


_READING = (
    "Higher PSNR and SSIM are better, lower LPIPS and flicker; a sharpness of 1 is that of the reference. PSNR, SSIM "
    "and sharpness kept are shares of the original's figures against the video.\n"
)


def _interval_texts(report: EvaluationReport, reference: str, figure: Figure) -> list[str | None] | None:
    """The interval of every decoder; None if none has one."""
    intervals = [mean_interval(report, decoder.name, reference, figure.name) for decoder in report.decoders]
    if not any(intervals):
        return None
    return [one and "–".join(format(end, figure.number_format) for end in one) for one in intervals]


def difference_table(report: EvaluationReport) -> TableData | None:
    """`differences` for people; None with fewer than two students."""
    entries = differences(report)
    if not entries:
        return None
    by_name = {figure.name: figure for figure in FIGURES}
    columns = (
        Column("figure", align="left"),
        Column("decoder", align="left"),
        Column("difference"),
        Column("95 % interval"),
        Column("clips", "d"),
    )
    rows: list[tuple[Cell, ...]] = []
    for entry in entries:
        figure = by_name[str(entry["figure"])]
        signed = f"+{figure.number_format}"
        interval = entry["interval_95"]
        shown = " to ".join(format(end, signed) for end in interval) if isinstance(interval, tuple) else None
        mean, count = entry["mean"], entry["num_clips"]
        assert isinstance(mean, float) and isinstance(count, int)
        label = figure.label.format(to="to the original")
        rows.append((label, str(entry["decoder"]), format(mean, signed), shown, count))
    return TableData(f"Differences to {entries[0]['than']}, clip by clip", columns, tuple(rows))


def clip_table(report: EvaluationReport) -> TableData:
    """One row per clip and decoder."""
    columns = (
        Column("clip", align="left"),
        Column("frames", "d"),
        Column("size", align="right"),
        Column("decoder", align="left"),
        Column("PSNR, dB", ".2f"),
        Column("SSIM", ".4f"),
        Column("LPIPS", ".4f"),
        Column("sharpness", ".3f"),
        Column("PSNR to the original, dB", ".2f"),
    )
    figures = ("psnr_db", "ssim", "lpips", "sharpness_ratio")
    rows = tuple(
        (
            clip.clip,
            clip.num_frames,
            f"{clip.width}×{clip.height}",
            clip.decoder,
            *(figure_of(clip.to_ground_truth, name) for name in figures),
            figure_of(clip.to_original, "psnr_db"),
        )
        for clip in report.clips
    )
    return TableData("Clips", columns, rows)


def to_json(report: EvaluationReport) -> str:
    """`report_document` as JSON. Ends with a newline."""
    return json.dumps(report_document(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report_document(report: EvaluationReport) -> dict[str, object]:
    """All figures as JSON values, with derived ones (retention, ms per frame)."""
    return {
        "kind": "flashvaed-evaluation",
        "schema": SCHEMA,
        "psnr_cap_db": PSNR_CAP_DB,
        "settings": {
            key: _number(value) if isinstance(value, float) else value for key, value in report.settings.items()
        },
        "decoders": [_decoder_document(report, decoder) for decoder in report.decoders],
        "made_with": dict(report.made_with),
        "differences": differences(report),
        "clips": [_clip_document(clip) for clip in report.clips],
        "notes": list(report.notes),
        "files": dict(report.files),
        "gates": [{**asdict(gate), "value": _number(gate.value), "text": gate.text} for gate in report.gates],
    }


def report_markdown(report: EvaluationReport, *, title: str = "Evaluation") -> str:
    """The whole report for GitHub: settings, tables, notes and links."""
    parts = [f"# {title}\n"]
    if report.settings:
        parts.append("".join(f"- {key}: {value}\n" for key, value in report.settings.items()))
    parts.append(to_markdown(summary_table(report, full=True)))
    parts.append(_READING)
    if report.gates:
        marks = [f"- {'passed' if gate.passed else '**failed**'}: {gate.text}\n" for gate in report.gates]
        parts.append("## Conditions\n\n" + "".join(marks))
    if report.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in report.notes))
    if (compared := difference_table(report)) is not None:
        parts.append(to_markdown(compared))
    if report.clips:
        parts.append(to_markdown(clip_table(report)))
    if report.files:
        parts.append("## Files\n\n" + "".join(_link(name, path) for name, path in report.files.items()))
    return "\n".join(parts)


def save_report(report: EvaluationReport, folder: Path, *, title: str = "Evaluation") -> dict[str, Path]:
    """Write `report.json` and `report.md`, each atomically. Returns the paths by kind."""
    paths = {"json": folder / REPORT_JSON, "markdown": folder / "report.md"}
    for kind, text in (("markdown", report_markdown(report, title=title)), ("json", to_json(report))):
        with atomic_path(paths[kind]) as sibling:
            sibling.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    return paths


def _decoder_document(report: EvaluationReport, decoder: DecoderFigures) -> dict[str, object]:
    speedup = decoder.speedup
    return {
        "name": decoder.name,
        "to_ground_truth": _mean_document(report, decoder, "to_ground_truth"),
        "to_original": _mean_document(report, decoder, "to_original"),
        "retention_percent": {key: _number(value) for key, value in retention_percent(report, decoder).items()},
        "frames_per_second": _number(decoder.frames_per_second),
        "frame_ms": _number(decoder.frame_ms),
        "speedup": speedup and {key: _number(getattr(speedup, key)) for key in ("median", "min", "max", "num_rounds")},
        "num_parameters": decoder.num_parameters,
        "file_bytes": decoder.file_bytes,
        "gflops_per_frame": _number(decoder.gflops),
        "peak_memory_bytes": decoder.peak_memory_bytes,
        "frechet": decoder.frechet and asdict(decoder.frechet),
        "pipeline": decoder.pipeline and decoder.pipeline.as_dict(),
        **({} if decoder.shape is None else {"shape": decoder.shape}),
    }


def _mean_document(report: EvaluationReport, decoder: DecoderFigures, reference: str) -> dict[str, object] | None:
    figures = _quality_document(getattr(decoder, reference))
    if figures is None:
        return None
    intervals = {one.name: mean_interval(report, decoder.name, reference, one.name) for one in FIGURES}
    num_clips = sum(row.decoder == decoder.name and getattr(row, reference) is not None for row in report.clips)
    return {**figures, "num_clips": num_clips, "interval_95": intervals}


def _clip_document(clip: ClipFigures) -> dict[str, object]:
    return {
        "clip": clip.clip,
        "decoder": clip.decoder,
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "to_ground_truth": _quality_document(clip.to_ground_truth),
        "to_original": _quality_document(clip.to_original),
    }


def _quality_document(quality: Quality | None) -> dict[str, float | int | None] | None:
    if quality is None:
        return None
    figures = {figure.name: _number(figure_of(quality, figure.name)) for figure in FIGURES}
    return {**figures, "num_frames": quality.num_frames}


def figure_of(quality: Quality | None, name: str) -> float | None:
    """One figure; a PSNR above the cap (identical frames) counts as the cap."""
    value = None if quality is None else getattr(quality, name, None)
    return PSNR_CAP_DB if name.endswith("psnr_db") and value is not None and value > PSNR_CAP_DB else value


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _text(value: float | int | None, number_format: str) -> str | None:
    return None if value is None else format(value, number_format)


def _speedup_text(speedup: Spread | None) -> str | None:
    return None if speedup is None else f"{speedup.median:.2f}×"


def _range_text(speedup: Spread | None) -> str | None:
    """None for a single round, which has no range."""
    return None if speedup is None or speedup.num_rounds == 1 else f"{speedup.min:.1f}–{speedup.max:.1f}"


def _link(name: str, path: str) -> str:
    if path.endswith(".png"):
        return f"- {name}:\n\n  ![{name}](<{path}>)\n"
    return f"- [{name}](<{path}>)\n"
