"""`report.html`: whole, self-contained, and saying what the figures say."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flashvaed_cli.metrics.quality import compare_frames
from flashvaed_cli.report.evaluation import ClipFigures, DecoderFigures, EvaluationReport, Spread, kept_interval
from flashvaed_cli.report.page import page
from flashvaed_cli.report.page.album import AlbumBuilder, ClipAlbum, frames_to_show, psnr_per_frame, worst_box
from flashvaed_cli.report.page.page import LineageEntry, PageExtras, headline, render_page

NUM_FRAMES, HEIGHT, WIDTH = 15, 48, 80


def views_of(seed: int, noise: float = 0.05) -> dict[str, Tensor]:
    """A clip, the original's output and two students'; one student is off in one corner of frame 3."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(3, NUM_FRAMES, HEIGHT, WIDTH, generator=generator) - 0.5
    original = video + 0.02 * torch.randn(video.shape, generator=generator)
    flash = original + noise * torch.randn(video.shape, generator=generator)
    flash[:, 3, 32:, 56:] += 0.4
    return {"video": video, "original": original, "flash": flash, "same": original.clone()}


def album_of(clip: str, views: dict[str, Tensor], *, chunk: int = 4) -> ClipAlbum:
    students = [name for name in views if name not in ("video", "original")]
    builder = AlbumBuilder(clip, NUM_FRAMES, video="video", original="original", students=students)
    for start in range(0, NUM_FRAMES, chunk):
        builder.update({label: frames[:, start : start + chunk] for label, frames in views.items()})
    return builder.finish()


def report_of(clips: dict[str, dict[str, Tensor]]) -> EvaluationReport:
    rows = []
    for clip, views in clips.items():
        for name in ("original", "flash", "same"):
            to_video = compare_frames(views[name], views["video"]) if "video" in views else None
            to_original = None if name == "original" else compare_frames(views[name], views["original"])
            rows.append(ClipFigures(clip, name, NUM_FRAMES, HEIGHT, WIDTH, to_video, to_original))
    first = {row.decoder: row for row in rows[:3]}
    return EvaluationReport(
        decoders=(
            DecoderFigures("original", first["original"].to_ground_truth, frames_per_second=2.0, num_parameters=1000),
            DecoderFigures("original, exact", frames_per_second=5.0),
            DecoderFigures(
                "flash",
                first["flash"].to_ground_truth,
                first["flash"].to_original,
                frames_per_second=20.0,
                speedup=Spread(10.0, 9.0, 11.0),
                num_parameters=110,
            ),
            DecoderFigures("same", first["same"].to_ground_truth, first["same"].to_original, num_parameters=1000),
        ),
        clips=tuple(rows),
        settings={"device": "cpu, 2 threads"},
        notes=("a note with <b>markup</b>",),
    )


@pytest.fixture(scope="module")
def clips() -> dict[str, dict[str, Tensor]]:
    return {name: views_of(seed) for seed, name in enumerate(("a.mp4", "b<script>.mp4", "c\x1b[2J.mp4"))}


@pytest.fixture(scope="module")
def html(clips: dict[str, dict[str, Tensor]]) -> str:
    extras = PageExtras(
        albums=tuple(album_of(name, views) for name, views in clips.items()),
        latency_ms={"mid": {"conv3d": 3.0, "norm": 1.0}, "up3": {"conv3d": 9.0}},
        r2={"up3": [0.5, 0.9, 0.999, 1.0]},
        training={"loss": [(1, 1.0), (2, 0.01)], "PSNR to the original, dB": [(1, 30.0), (2, 31.0)]},
        phases=((0, "phase 1"), (1, "phase 3")),
        lineage=(LineageEntry("judged", "flash.safetensors", "ab" * 32),),
        commands=("flashvaed prune", "flashvaed eval"),
    )
    return render_page(report_of(clips), extras)


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    places = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert places and all(place.startswith(("data:", "#", "source(")) for place in places)
    assert "@import" not in html and "fetch(" not in html


def test_names_from_files_are_no_markup_and_no_escapes(html: str) -> None:
    assert "b&lt;script&gt;.mp4" in html and "<b>markup" not in html and "\x1b" not in html


def test_every_part_is_there(html: str) -> None:
    for part in (
        "10.0×",
        "4.00× the speed of the tuned exact one",
        "range of the rounds 9.00–11.00",
        "95 % interval",
        "11 %",
        "Worst place: frame 3",
        "32 and more of 255 levels",
        "Quality against speed",
        "(published)",
        "variance not explained",
        "by operator",
        "phase 3",
        "flashvaed prune\nflashvaed eval",
        "abababababababab",
        "cpu, 2 threads",
    ):
        assert part in html, part
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(ids)


def test_figures_are_those_of_the_report(clips: dict[str, dict[str, Tensor]], html: str) -> None:
    report = report_of(clips)
    own, original = report.decoders[2].to_ground_truth, report.decoders[0].to_ground_truth
    assert own is not None and original is not None
    assert f"{100 * own.psnr_db / original.psnr_db:.1f} %" in headline(report).sentence
    assert f"{own.psnr_db:.2f}" in html


def test_a_report_on_latents_alone_speaks_of_the_original(clips: dict[str, dict[str, Tensor]]) -> None:
    without = {name: {k: v for k, v in views.items() if k != "video"} for name, views in clips.items()}
    report = report_of(without)
    assert re.search(r"has a PSNR of \d+\.\d dB to its output", headline(report).sentence)
    assert "to the video" not in render_page(report, PageExtras((album_of("a", without["a.mp4"]),))).split("<main>")[0]


def test_the_original_alone_makes_a_page(clips: dict[str, dict[str, Tensor]]) -> None:
    report = report_of(clips)
    alone = replace(report, decoders=report.decoders[:1], clips=())
    views = {label: clips["a.mp4"][label] for label in ("video", "original")}
    assert "nothing to compare it with" in render_page(alone, PageExtras((album_of("a", views),)))


def test_videos_are_left_out_where_the_page_grows_too_large(
    clips: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    albums = [replace(album_of(name, views), videos={"video": bytes(50_000 * (i + 1))}) for i, (name, views) in
              enumerate(clips.items())]  # fmt: skip
    report, extras = report_of(clips), PageExtras(tuple(albums))
    whole = len(render_page(report, extras).encode())
    monkeypatch.setattr(page, "MAX_BYTES", whole - 1)
    smaller = render_page(report, extras)
    assert smaller.count("<video") == 2 and len(smaller.encode()) < whole - 150_000


@pytest.mark.parametrize("chunk", [1, 4, 15])
def test_albums_do_not_depend_on_the_chunk(clips: dict[str, dict[str, Tensor]], chunk: int) -> None:
    one, other = (album_of("a", clips["a.mp4"], chunk=size) for size in (chunk, 7))
    assert replace(one, psnr_to_original={}, psnr_to_video={}, worst=None) == replace(
        other, psnr_to_original={}, psnr_to_video={}, worst=None
    )
    assert one.worst is not None and other.worst is not None and one.worst.views == other.worst.views
    for name in ("flash", "original"):
        assert one.psnr_to_video[name] == pytest.approx(other.psnr_to_video[name], rel=1e-6)


def test_the_worst_place_is_found(clips: dict[str, dict[str, Tensor]]) -> None:
    album = album_of("a", clips["a.mp4"])
    worst = album.worst
    assert worst is not None and worst.frame == 3
    left, top, right, bottom = worst.box
    assert (right, bottom) == (WIDTH, HEIGHT) and right - left == bottom - top == 32
    region = np.asarray(Image.open(io.BytesIO(worst.views["difference"])))
    assert region.shape[0] % 32 == 0 and region.mean() > 100  # light: far off
    assert worst.psnr_db == min(album.psnr_to_original["flash"])
    assert all(math.isinf(value) for value in album.psnr_to_original["same"])


def test_psnr_of_a_frame_is_that_of_the_metric(clips: dict[str, dict[str, Tensor]]) -> None:
    flash, original = clips["a.mp4"]["flash"], clips["a.mp4"]["original"]
    values = psnr_per_frame(flash, original)
    for index in (0, 3):
        one = compare_frames(flash[:, index : index + 1], original[:, index : index + 1]).psnr_db
        assert values[index] == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 300), (300, 5), (33, 47)])
def test_regions_of_odd_sizes_lie_in_the_frame(height: int, width: int) -> None:
    picture = torch.zeros(height, width, 3, dtype=torch.uint8)
    left, top, right, bottom = worst_box(picture, picture + 1)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_frames_shown_are_spread_over_the_clip() -> None:
    assert frames_to_show(3) == (0, 1, 2)
    shown = frames_to_show(100)
    assert len(shown) == 12 and shown[0] == 0 and shown[-1] == 99 and list(shown) == sorted(set(shown))


def test_the_interval_holds_the_share_and_needs_three_clips(clips: dict[str, dict[str, Tensor]]) -> None:
    report = report_of(clips)
    interval = kept_interval(report, report.decoders[2])
    assert interval is not None and interval[0] <= interval[1] < 100
    assert kept_interval(report, report.decoders[3]) == pytest.approx((100, 100))
    assert kept_interval(replace(report, clips=report.clips[:6]), report.decoders[2]) is None
