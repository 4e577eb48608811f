"""Fill the page: what `eval` found, with pictures, charts and how it was measured, in one file that works offline."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flashvaed_cli import __version__
from flashvaed_cli.printable import printable
from flashvaed_cli.report.charts.analysis import explained_variance, latency_by_stage
from flashvaed_cli.report.charts.quality import Point, psnr_over_frames, quality_against_speed
from flashvaed_cli.report.charts.style import PAGE as COLOURS
from flashvaed_cli.report.charts.style import to_svg
from flashvaed_cli.report.charts.training import training_curves
from flashvaed_cli.report.evaluation import (
    DecoderFigures,
    EvaluationReport,
    clip_table,
    difference_table,
    kept_interval,
    retention_percent,
    summary_table,
)
from flashvaed_cli.report.page.album import DIFFERENCE_FULL_SCALE, ClipAlbum, scale_bar
from flashvaed_cli.report.tables import TableData

PAGE = "report.html"
MAX_BYTES = 20_000_000
"""Size limit of the page; the longest videos are left out until it fits."""

_HERE = Path(__file__).parent
_OWN_TUNED = "original, exact"

PUBLISHED = (
    Point("Flash-VAED Wan 2.1", 118.77 / 19.27, 100 * 37.61 / 40.40, "arXiv 2602.19161"),
    Point("LightVAE Wan 2.1", 118.60 / 19.27, 100 * 32.61 / 40.40, "arXiv 2602.19161"),
    Point("Flash-VAED LTX", 1168 / 204.55, 100 * 32.24 / 33.28, "arXiv 2602.19161"),
    Point("Turbo-VAED LTX", 623 / 204.55, 100 * 31.52 / 33.28, "arXiv 2602.19161"),
)
"""From the paper's main table: UCF-101 on an RTX 5090D, against the eager original there."""

_PUBLISHED_NOTE = (
    "Filled: measured here. Hollow: published in arXiv 2602.19161 (UCF-101, RTX 5090D); another machine, other videos "
    "and another VAE, so compare the shape, not the digits."
)


@dataclass(frozen=True)
class LineageEntry:
    """A file that the decoder was made from."""

    role: str
    location: str
    sha256: str


@dataclass(frozen=True)
class PageExtras:
    """What the page shows beyond the report. Empty if not available.

    Attributes:
        latency_ms: stage to operator to milliseconds, of the analysis.
        r2: stage to R2 of the kept channels, greedily chosen, of the analysis.
        training: figure to points (step, value) over all phases.
        phases: first step and name of each phase.
        commands: command lines that led to the decoder, oldest first.
    """

    albums: tuple[ClipAlbum, ...] = ()
    latency_ms: Mapping[str, Mapping[str, float]] | None = None
    r2: Mapping[str, Sequence[float]] | None = None
    training: Mapping[str, Sequence[tuple[float, float]]] | None = None
    phases: tuple[tuple[float, str], ...] = ()
    lineage: tuple[LineageEntry, ...] = ()
    commands: tuple[str, ...] = ()


def render_page(report: EvaluationReport, extras: PageExtras, *, title: str = "flashvaed report") -> str:
    """The whole page as HTML, of at most `MAX_BYTES` if leaving out videos gets it there."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    albums = sorted(extras.albums, key=lambda album: album.worst_psnr_db)
    with_videos = {album.clip for album in albums if album.videos}
    while True:
        html = environment.get_template("template.html").render(
            title=title,
            version=__version__,
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            js=(_HERE / "page.js").read_text(encoding="utf-8"),
            headline=headline(report),
            notes=[printable(note) for note in report.notes],
            albums=[_album(album, report, with_video=album.clip in with_videos) for album in albums],
            scale_bar=_webp(scale_bar()),
            full_scale=DIFFERENCE_FULL_SCALE,
            tables=_tables(report),
            all_figures=_table(summary_table(report, full=True)),
            charts=_charts(report, extras),
            settings=[(key, printable(str(value))) for key, value in report.settings.items()],
            lineage=extras.lineage,
            commands=printable("\n".join(extras.commands)),
        )
        if len(html.encode()) <= MAX_BYTES or not with_videos:
            return html
        with_videos.discard(max((a for a in albums if a.clip in with_videos), key=_video_bytes).clip)


@dataclass(frozen=True)
class HeadlineFigure:
    """A headline number, what it is, and how certain it is."""

    value: str
    what: str
    detail: str


@dataclass(frozen=True)
class Headline:
    """One sentence and three numbers."""

    sentence: str
    figures: tuple[HeadlineFigure, ...]


def headline(report: EvaluationReport) -> Headline:
    """What the first decoder after the original gained and lost."""
    students = [decoder for decoder in report.decoders if decoder.to_original is not None]
    if not students:
        return Headline("The original decoder alone; nothing to compare it with.", ())
    student, original = students[0], report.original
    tuned = next((decoder for decoder in report.decoders if decoder.name == _OWN_TUNED), None)
    faster, kept, smaller = _faster(student, tuned), _kept(report, student), _smaller(student, original)
    quality = "has a PSNR of {} to its output" if kept.value.endswith("dB") else "keeps {} of its PSNR to the video"
    clauses = [quality.format(kept.value), f"has {smaller.value} of its parameters"]
    if student.speedup is not None:
        clauses.insert(0, f"decodes {faster.value} as fast as the eager original")
    sentence = f"{printable(student.name)} {', '.join(clauses[:-1])} and {clauses[-1]}."
    return Headline(sentence, (faster, kept, smaller))


def _faster(student: DecoderFigures, tuned: DecoderFigures | None) -> HeadlineFigure:
    if student.speedup is None:
        return HeadlineFigure("–", "speed not measured", "")
    detail = f"range of the rounds {student.speedup.min:.2f}–{student.speedup.max:.2f}"
    if student.speedup.num_rounds == 1:
        detail = "one round: measure again on a faster or quieter machine"
    if tuned is not None and tuned.frames_per_second and student.frames_per_second:
        over_tuned = student.frames_per_second / tuned.frames_per_second
        detail = f"{over_tuned:.2f}× the speed of the tuned exact one; {detail}"
    return HeadlineFigure(f"{student.speedup.median:.1f}×", "the speed of the eager original", detail)


def _kept(report: EvaluationReport, student: DecoderFigures) -> HeadlineFigure:
    share = retention_percent(report, student)["psnr_db"]
    if share is None:
        assert student.to_original is not None
        return HeadlineFigure(
            f"{min(student.to_original.psnr_db, 100):.1f} dB", "PSNR to the original's output", "latents without video"
        )
    interval = kept_interval(report, student)
    num_clips = sum(1 for row in report.clips if row.decoder == student.name)
    of_clips = f"{num_clips} clip{'s' if num_clips != 1 else ''}"
    detail = (
        f"{of_clips}: too few for an interval"
        if interval is None
        else f"95 % interval {interval[0]:.1f}–{interval[1]:.1f} % over {of_clips}"
    )
    return HeadlineFigure(f"{share:.1f} %", "of the original's PSNR to the video kept", detail)


def _smaller(student: DecoderFigures, original: DecoderFigures) -> HeadlineFigure:
    if not student.num_parameters or not original.num_parameters:
        return HeadlineFigure("–", "size unknown", "")
    detail = f"{student.num_parameters:,} of {original.num_parameters:,}"
    return HeadlineFigure(
        f"{100 * student.num_parameters / original.num_parameters:.0f} %", "of the parameters", detail
    )


def _video_bytes(album: ClipAlbum) -> int:
    return sum(map(len, album.videos.values()))


def _album(album: ClipAlbum, report: EvaluationReport, *, with_video: bool) -> dict[str, object]:
    students = album.students
    left, right = album.original, students[0] if students else album.labels[0]
    index = len(album.frame_numbers) // 2
    if (worst := album.worst) is not None:
        index = min(range(len(album.frame_numbers)), key=lambda i: abs(album.frame_numbers[i] - worst.frame))
    pictures = {label: [_base64(picture) for picture in album.frames[label]] for label in album.labels}
    pictures |= {f"difference: {label}": [_base64(p) for p in album.differences[label]] for label in students}
    data = json.dumps({"numbers": album.frame_numbers, "pictures": pictures}).replace("<", "\\u003c")
    decoders = (album.original, *students)
    known = {"original": album.psnr_to_original, "video": album.psnr_to_video}
    curves = [
        psnr_over_frames(values, COLOURS, reference=to, decoders=decoders) for to, values in known.items() if values
    ]
    return {
        "clip": printable(album.clip),
        "num_frames": album.num_frames,
        "width": album.width,
        "height": album.height,
        "summary": _clip_summary(album, report),
        "original": album.original,
        "main": students[0] if students else "",
        "choices": list(pictures),
        "left": left,
        "right": right,
        "first_index": index,
        "first_number": album.frame_numbers[index],
        "last_index": len(album.frame_numbers) - 1,
        "left_source": _webp(album.frames[left][index]),
        "right_source": _webp(album.frames[right][index]),
        "worst": _worst(album),
        "videos": [(label, _mp4(video)) for label, video in album.videos.items()] if with_video else [],
        "charts": [to_svg(figure) for figure in curves] if album.num_frames > 1 else [],
        "json": data,
    }


def _clip_summary(album: ClipAlbum, report: EvaluationReport) -> str:
    return "; ".join(
        f"{printable(row.decoder)}: {min(row.to_original.psnr_db, 100):.2f} dB to the original"
        for row in report.clips
        if row.clip == album.clip and row.to_original is not None
    )


def _worst(album: ClipAlbum) -> dict[str, object] | None:
    worst = album.worst
    if worst is None:
        return None
    left, top, right, bottom = worst.box
    return {
        "frame": worst.frame,
        "psnr": f"{worst.psnr_db:.2f}" if math.isfinite(worst.psnr_db) else "over 100",
        "left": left,
        "top": top,
        "width": right - left,
        "height": bottom - top,
        "views": [(label, _webp(picture)) for label, picture in worst.views.items()],
    }


def _charts(report: EvaluationReport, extras: PageExtras) -> list[dict[str, str]]:
    found = []
    points = [
        Point(printable(decoder.name), decoder.speedup.median if decoder.speedup else 1.0, share)
        for decoder in report.decoders
        if (share := retention_percent(report, decoder)["psnr_db"]) is not None
    ]
    if len(points) > 1:
        svg = to_svg(quality_against_speed((*points, *PUBLISHED), COLOURS))
        found.append({"title": "Quality against speed", "svg": svg, "caption": _PUBLISHED_NOTE})
    if extras.training:
        caption = "From the log of the last distillation. Logarithmic where a figure falls by a factor of more than 20."
        svg = to_svg(training_curves(extras.training, COLOURS, phases=extras.phases, max_columns=2))
        found.append({"title": "Training", "svg": svg, "caption": caption})
    if extras.latency_ms:
        caption = "For the decoder that was analysed, with plain operators."
        svg = to_svg(latency_by_stage(extras.latency_ms, COLOURS))
        found.append({"title": "Where the original's time goes", "svg": svg, "caption": caption})
    if extras.r2:
        caption = (
            "Lower is better: the share of the variance that the kept channels of a stage's stream do not explain."
        )
        svg = to_svg(explained_variance({"": extras.r2}, COLOURS))
        found.append({"title": "How strongly channels depend on one another", "svg": svg, "caption": caption})
    return found


def _tables(report: EvaluationReport) -> list[dict[str, object]]:
    tables = (summary_table(report), difference_table(report), clip_table(report))
    return [_table(table) for table in tables if table is not None]


def _table(table: TableData) -> dict[str, object]:
    rows = [[printable(text) for text in texts] for texts in table.texts()]
    return {"title": table.title, "columns": [column.name for column in table.columns], "rows": rows}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _webp(data: bytes) -> str:
    return f"data:image/webp;base64,{_base64(data)}"


def _mp4(data: bytes) -> str:
    return f"data:video/mp4;base64,{_base64(data)}"
