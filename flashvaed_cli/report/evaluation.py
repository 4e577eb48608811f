"""What `eval` found, as data, JSON, Markdown and tables.

JSON holds plain numbers only: an infinite PSNR (identical clips) is written as `PSNR_CAP_DB`, any
other number that is not finite as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.numerics.bootstrap import bootstrap_interval
from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown

SCHEMA = 1
PSNR_CAP_DB = 100.0
REPORT_JSON = "report.json"
_FIGURES = ("psnr_db", "ssim", "lpips", "sharpness_ratio", "flicker")


@runtime_checkable
class Quality(Protocol):
    """Figures of one decoder against one reference; None where a figure is not defined."""

    @property
    def psnr_db(self) -> float: ...
    @property
    def ssim(self) -> float | None: ...
    @property
    def lpips(self) -> float | None: ...
    @property
    def sharpness_ratio(self) -> float | None: ...
    @property
    def flicker(self) -> float | None: ...
    @property
    def num_frames(self) -> int: ...


@dataclass(frozen=True)
class Spread:
    """A measured ratio over several rounds."""

    median: float
    min: float
    max: float


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
        gflops: per decoded frame; a multiplication with addition counts 2.
        peak_memory_bytes: while decoding.
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
    """

    decoders: tuple[DecoderFigures, ...]
    clips: tuple[ClipFigures, ...] = ()
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a report without decoders or with two of one name."""
        names = [decoder.name for decoder in self.decoders]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a report needs decoders with different names, not {names}")

    @property
    def original(self) -> DecoderFigures:
        """What the others are measured against."""
        return self.decoders[0]


def retention_percent(report: EvaluationReport, decoder: DecoderFigures) -> dict[str, float | None]:
    """Share of the original's quality against ground truth that a decoder keeps.

    `psnr_db` is the ratio of decibels, as in the paper; `ssim` the ratio of SSIM; `sharpness_ratio`
    the ratio of Laplacian energies, so 100 % means as sharp as the original decoder.

    Reference: arXiv 2602.19161, section 4 (the "96.9 % of the quality").
    """
    kept: dict[str, float | None] = {}
    for name in ("psnr_db", "ssim", "sharpness_ratio"):
        own, original = (_figure(figures.to_ground_truth, name) for figures in (decoder, report.original))
        kept[name] = 100 * own / original if own is not None and original else None
    return kept


def kept_interval(report: EvaluationReport, decoder: DecoderFigures) -> tuple[float, float] | None:
    """The 95 % interval of `retention_percent`'s `psnr_db`, resampled over clips; None for fewer than three.

    The decoder and the original are resampled together: what differs between clips alone does not widen it.
    """
    pairs: dict[str, dict[str, float]] = {}
    for row in report.clips:
        value = _figure(row.to_ground_truth, "psnr_db")
        if value is not None:
            pairs.setdefault(row.clip, {})[row.decoder] = value
    both = [(pair[decoder.name], pair[report.original.name]) for pair in pairs.values() if decoder.name in pair]

    def share(sample: Sequence[tuple[float, float]]) -> float:
        return 100 * math.fsum(own for own, _ in sample) / math.fsum(original for _, original in sample)

    return bootstrap_interval(both, share)


def summary_table(report: EvaluationReport) -> TableData:
    """One row per figure, one column per decoder: fits a terminal however many figures there are."""
    columns = (
        Column("", align="left", wraps=False),
        *(Column(decoder.name, wraps=True) for decoder in report.decoders),
    )
    kept = [retention_percent(report, decoder) for decoder in report.decoders]
    rows: list[tuple[Cell, ...]] = []

    def add(label: str, number_format: str, values: list[float | int | None]) -> None:
        if any(value is not None for value in values):
            rows.append((label, *(_text(value, number_format) for value in values)))

    for label, number_format, name in _QUALITY_ROWS:
        add(label, number_format, [_figure(decoder.to_ground_truth, name) for decoder in report.decoders])
    for label, number_format, name in _QUALITY_ROWS:
        label = label.replace("to the video", "to the original")
        add(label, number_format, [_figure(decoder.to_original, name) for decoder in report.decoders])
    add("PSNR kept, %", ".1f", [share["psnr_db"] for share in kept])
    add("SSIM kept, %", ".1f", [share["ssim"] for share in kept])
    add("sharpness kept, %", ".1f", [share["sharpness_ratio"] for share in kept])
    add("frames per second", ".2f", [decoder.frames_per_second for decoder in report.decoders])
    add("ms per frame", ".2f", [decoder.frame_ms for decoder in report.decoders])
    if any(decoder.speedup for decoder in report.decoders):
        rows.append(("speed-up", *(_speedup_text(decoder.speedup) for decoder in report.decoders)))
        rows.append(("speed-up, range of rounds", *(_range_text(decoder.speedup) for decoder in report.decoders)))
    add("parameters, million", ".3f", [_scaled(decoder.num_parameters, 1e6) for decoder in report.decoders])
    add("file, MB", ".2f", [_scaled(decoder.file_bytes, 1e6) for decoder in report.decoders])
    add("GFLOPs per frame", ".2f", [decoder.gflops for decoder in report.decoders])
    add("peak memory, MB", ".0f", [_scaled(decoder.peak_memory_bytes, 1e6) for decoder in report.decoders])
    return TableData("Decoders", columns, tuple(rows))


_READING = (
    "Higher PSNR and SSIM are better, lower LPIPS and flicker; a sharpness of 1 is that of the reference. PSNR, SSIM "
    "and sharpness kept are shares of the original's figures against the video.\n"
)
_QUALITY_ROWS = (
    ("PSNR to the video, dB", ".2f", "psnr_db"),
    ("SSIM to the video", ".4f", "ssim"),
    ("LPIPS to the video", ".4f", "lpips"),
    ("sharpness to the video", ".3f", "sharpness_ratio"),
    ("flicker to the video", ".4f", "flicker"),
)


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
            *(_figure(clip.to_ground_truth, name) for name in figures),
            _figure(clip.to_original, "psnr_db"),
        )
        for clip in report.clips
    )
    return TableData("Clips", columns, rows)


def to_json(report: EvaluationReport) -> str:
    """Valid JSON of all figures, with derived ones (retention, ms per frame). Ends with a newline."""
    document = {
        "kind": "flashvaed-evaluation",
        "schema": SCHEMA,
        "psnr_cap_db": PSNR_CAP_DB,
        "settings": {
            key: _number(value) if isinstance(value, float) else value for key, value in report.settings.items()
        },
        "decoders": [_decoder_document(report, decoder) for decoder in report.decoders],
        "clips": [_clip_document(clip) for clip in report.clips],
        "notes": list(report.notes),
        "files": dict(report.files),
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report_markdown(report: EvaluationReport, *, title: str = "Evaluation") -> str:
    """The whole report for GitHub: settings, tables, notes and links."""
    parts = [f"# {title}\n"]
    if report.settings:
        parts.append("".join(f"- {key}: {value}\n" for key, value in report.settings.items()))
    parts.append(to_markdown(summary_table(report)))
    parts.append(_READING)
    if report.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in report.notes))
    if report.clips:
        parts.append(to_markdown(clip_table(report)))
    if report.files:
        parts.append("## Files\n\n" + "".join(_link(name, path) for name, path in report.files.items()))
    return "\n".join(parts)


def save_report(report: EvaluationReport, folder: Path, *, title: str = "Evaluation") -> dict[str, Path]:
    """Write `report.json` and `report.md`, each whole or not at all. Returns the paths by kind."""
    paths = {"json": folder / REPORT_JSON, "markdown": folder / "report.md"}
    for kind, text in (("markdown", report_markdown(report, title=title)), ("json", to_json(report))):
        with atomic_path(paths[kind]) as sibling:
            sibling.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    return paths


def _decoder_document(report: EvaluationReport, decoder: DecoderFigures) -> dict[str, object]:
    speedup = decoder.speedup
    return {
        "name": decoder.name,
        "to_ground_truth": _quality_document(decoder.to_ground_truth),
        "to_original": _quality_document(decoder.to_original),
        "retention_percent": {key: _number(value) for key, value in retention_percent(report, decoder).items()},
        "frames_per_second": _number(decoder.frames_per_second),
        "frame_ms": _number(decoder.frame_ms),
        "speedup": speedup and {key: _number(getattr(speedup, key)) for key in ("median", "min", "max")},
        "num_parameters": decoder.num_parameters,
        "file_bytes": decoder.file_bytes,
        "gflops_per_frame": _number(decoder.gflops),
        "peak_memory_bytes": decoder.peak_memory_bytes,
    }


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
    return {**{name: _number(_figure(quality, name)) for name in _FIGURES}, "num_frames": quality.num_frames}


def _figure(quality: Quality | None, name: str) -> float | None:
    """One figure; a PSNR above the cap (identical clips) counts as the cap."""
    value = None if quality is None else getattr(quality, name)
    return PSNR_CAP_DB if name == "psnr_db" and value is not None and value > PSNR_CAP_DB else value


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _text(value: float | int | None, number_format: str) -> str | None:
    return None if value is None else format(value, number_format)


def _speedup_text(speedup: Spread | None) -> str | None:
    return None if speedup is None else f"{speedup.median:.2f}×"


def _range_text(speedup: Spread | None) -> str | None:
    return None if speedup is None else f"{speedup.min:.1f}–{speedup.max:.1f}"


def _link(name: str, path: str) -> str:
    if path.endswith(".png"):
        return f"- {name}:\n\n  ![{name}](<{path}>)\n"
    return f"- [{name}](<{path}>)\n"
