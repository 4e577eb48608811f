"""What `flashvaed eval` takes and refuses beyond a decoder and its clips."""

from __future__ import annotations

import html
import shutil
import warnings
from pathlib import Path

import pytest

from tests.commands import CALIBRATION, JUDGING, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    return tmp_path


def test_an_original_to_compare_with_is_left_out(folder: Path) -> None:
    """Whatever it is called: a builtin is no file of the working directory."""
    document = succeed(
        f"eval builtin:tiny-wan --compare builtin:tiny-wan --data clip.mp4 {JUDGING} -o report", cwd=folder
    )
    assert [one["name"] for one in document["decoders"] if "exact" not in one["name"]] == ["original"]


def test_clips_that_are_too_short_for_a_protocol_are_named(folder: Path) -> None:
    words = f"eval vae.safetensors --data clip.mp4 --protocol davis {JUDGING.replace('--max-side 64', '')} -o report"
    document = succeed(words, cwd=folder)
    (note,) = [note for note in document["notes"] if "protocol" in note]
    assert "davis judges 17 frames" in note
    assert "clip.mp4 (5 frames)" in note


@pytest.mark.parametrize("asked", ["", "--force"])
def test_a_junit_file_never_takes_the_place_of_an_input(folder: Path, asked: str) -> None:
    shutil.copy(folder / "vae.safetensors", folder / "vae.xml")
    before = (folder / "vae.xml").read_bytes()
    result = invoke(f"eval vae.xml --data clip.mp4 {JUDGING} --junit vae.xml {asked} -o report", cwd=folder)
    assert result.exit_code == 2
    assert "vae.xml is read by this command" in " ".join(result.stderr.split())
    assert (folder / "vae.xml").read_bytes() == before


def test_a_junit_file_is_not_the_folder_of_the_report(folder: Path) -> None:
    result = invoke(f"eval vae.safetensors --data clip.mp4 {JUDGING} --junit a.xml -o a.xml", cwd=folder)
    assert result.exit_code == 2
    assert "a.xml is the folder of the report" in " ".join(result.stderr.split())
    assert not (folder / "a.xml").exists()


def test_names_in_any_script_draw_no_warning(folder: Path) -> None:
    shutil.copy(folder / "vae.safetensors", folder / "日本.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        succeed("convert-ops 日本.safetensors --profile exact -o 本.safetensors", cwd=folder)
        succeed(f"eval 本.safetensors --data clip.mp4 {JUDGING} -o report", cwd=folder)
    assert "本" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_the_share_of_a_pipeline_is_in_all_three_reports(folder: Path) -> None:
    succeed(f"convert-ops vae.safetensors --data clip.mp4 {CALIBRATION} --reconstruct none", cwd=folder)
    document = succeed(
        f"eval converted.safetensors --data clip.mp4 --pipeline-seconds 0.5 {JUDGING} -o report", cwd=folder
    )
    original, *others = document["decoders"]
    assert original["pipeline"]["speedup"] == 1
    for decoder in others:
        decode_s = decoder["pipeline"]["total_s"] - 0.5
        assert decode_s == pytest.approx(5 / decoder["frames_per_second"])
        assert decoder["pipeline"]["speedup"] == pytest.approx(
            original["pipeline"]["total_s"] / decoder["pipeline"]["total_s"]
        )
    for name in ("report.md", "report.html"):
        assert "decoding's share of it, %" in html.unescape((folder / "report" / name).read_text(encoding="utf-8"))
