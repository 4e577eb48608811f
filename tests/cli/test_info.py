"""`flashvaed info`: what a file is, where it came from, what differs; no record is believed unchecked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.store import content_sha256, read_header, sha256_of
from tests.commands import invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae

CALIBRATION = "--data clip.mp4 --num-calibration-clips 1 --num-frames 5 --crop-size 32"
STEPS = (
    f"analyze vae.safetensors {CALIBRATION} --num-latency-rounds 1 --latency-frames 5 --latency-side 32 "
    "--width-latency-s 0",
    f"prune vae.safetensors --analysis analysis.safetensors --ratio 0.5 {CALIBRATION}",
    f"convert-ops {CALIBRATION}",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    for words in STEPS:
        succeed(words, cwd=folder)
    return folder


def info(words: str, folder: Path) -> dict:
    (facts,) = succeed(f"info {words}", cwd=folder)["files"]
    return facts


def test_an_artifact_tells_what_it_is(made: Path) -> None:
    facts = info("converted.safetensors --size 5x64x96", made)
    header = read_header(made / "converted.safetensors")
    assert (facts["kind"], facts["family"], facts["recognised_by"]) == ("decoder", "wan2.1", "its own header")
    assert facts["sha256"] == content_sha256(made / "converted.safetensors")
    assert facts["file_sha256"] == sha256_of(made / "converted.safetensors") != facts["sha256"]
    assert facts["size_bytes"] == (made / "converted.safetensors").stat().st_size
    assert header.decoder is not None
    assert [stage["name"] for stage in facts["decoder"]["stages"]] == [stage.name for stage in header.decoder.stages]
    assert sum(stage["parameters"] for stage in facts["decoder"]["stages"]) == facts["decoder"]["parameters"]
    whole = info("converted.safetensors --size 5x128x192", made)["decoder"]["gflop"]
    assert whole == pytest.approx(4 * facts["decoder"]["gflop"], rel=0.05)
    assert facts["next"][0] == "flashvaed distill converted.safetensors --data clips/"


def test_the_run_is_recorded(made: Path) -> None:
    run = info("pruned.safetensors", made)["run"]
    assert run["torch"] == torch.__version__
    assert run["device"].startswith("cpu") and run["num_threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", run["started"]) and run["duration_s"] > 0
    clip = made / "clip.mp4"
    assert run["data"] == [{"name": "clip.mp4", "size_bytes": clip.stat().st_size, "sha256": sha256_of(clip)}]


def test_the_lineage_is_checked(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)

    def states() -> dict[str, str]:
        found, waiting = {}, info("converted.safetensors", folder)["lineage"]
        while waiting:
            one = waiting.pop()
            found[one["location"]] = one["state"]
            waiting += one["parents"]
        return found

    everything = dict.fromkeys(("vae.safetensors", "analysis.safetensors", "pruned.safetensors"), "unchanged")
    assert states() == everything
    (folder / "analysis.safetensors").unlink()
    write_toy_vae(folder / "vae.safetensors", seed=1)
    assert states() == everything | {"analysis.safetensors": "absent", "vae.safetensors": "changed"}


def test_recorded_places_are_not_read_unless_the_hash_fits(made: Path, tmp_path: Path) -> None:
    """A parent that names somebody's file tells nothing of what is in it."""
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    succeed(f"prune vae.safetensors --ratio 0.25 {CALIBRATION} -o pruned.safetensors --force", cwd=folder)
    (parent,) = (one for one in info("converted.safetensors", folder)["lineage"] if one["role"] == "decoder")
    assert (parent["state"], parent["command"], parent["parents"]) == ("changed", None, [])


def test_an_analysis(made: Path) -> None:
    facts = info("analysis.safetensors", made)
    assert (facts["kind"], facts["decoder"]) == ("analysis", None)
    assert facts["measured"]["clips"] == "1 (0 skipped)" and "5 frames of 32 x 32" in facts["measured"]["latency"]
    assert facts["next"] == ["flashvaed prune vae.safetensors --analysis analysis.safetensors --ratio 0.25"]


def test_files_of_other_programs(made: Path, tmp_path: Path) -> None:
    succeed(f"export vae.safetensors -t safetensors -o '{tmp_path / 'out'}'", cwd=made)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    facts = info(str(file), made)
    assert facts["recognised_by"] == "names and shapes of its tensors: the layout wan-original"
    assert facts["sha256"] == facts["file_sha256"] == sha256_of(file)
    assert (facts["flashvaed"], facts["lineage"], facts["run"]) == (None, [], None)
    assert facts["next"][0].startswith("flashvaed analyze ")


def test_files_side_by_side_show_what_differs(made: Path) -> None:
    shown = invoke("info pruned.safetensors converted.safetensors", cwd=made).stdout
    differs, same = shown.split("What is the same")
    assert "up3: operators" in differs + same and "GFLOP for 9x256x256" in differs
    assert re.search(r"│ family +│ wan2.1", same) and "family" not in differs
    assert len(succeed("info pruned.safetensors converted.safetensors", cwd=made)["files"]) == 2


def test_a_file_that_cannot_be_read_hides_no_other(made: Path) -> None:
    words = "info pruned.safetensors absent.safetensors converted.safetensors"
    result = invoke(words, cwd=made)
    assert result.exit_code == 2 and "absent.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert "What differs" in result.stdout and "up3: operators" in result.stdout
    document = json.loads(invoke(f"{words} --json", cwd=made).stdout)
    assert [one["file"] for one in document["files"]] == ["pruned.safetensors", "converted.safetensors"]
    assert [one["file"] for one in document["failed"]] == ["absent.safetensors"]
    both = invoke("info absent.safetensors gone.safetensors", cwd=made)
    assert both.exit_code == 2 and "absent" in both.stderr and "gone" in both.stderr


def test_what_was_measured_beside_it(made: Path) -> None:
    succeed("eval converted.safetensors --data clip.mp4 --num-frames 5 --num-speed-rounds 1 --lpips off", cwd=made)
    shown = info("converted.safetensors", made)["reports"]
    report = json.loads((made / "report" / "report.json").read_text())
    judged = next(one for one in report["decoders"] if one["name"] == "converted")
    kept = judged["retention_percent"]["psnr_db"]
    assert shown["report"]["PSNR kept"] == f"{kept:.1f} %"
    assert info("pruned.safetensors", made)["reports"] == {}
    succeed("export converted.safetensors -t safetensors", cwd=made)
    assert f"- PSNR kept: {kept:.1f} %" in (made / "export" / "README.md").read_text(encoding="utf-8")


def test_without_a_file_the_newest_result_here(made: Path, tmp_path: Path) -> None:
    assert info("", made)["file"] == "converted.safetensors"
    assert info("", tmp_path)["file"] == "builtin:tiny-wan"


@pytest.mark.parametrize("words", ["absent.safetensors", "clip.mp4", "vae.safetensors --size 9x9"])
def test_mistakes(made: Path, words: str) -> None:
    result = invoke(f"info {words}", cwd=made)
    assert result.exit_code == 2 and "Error" in result.stderr and "Traceback" not in result.stderr
