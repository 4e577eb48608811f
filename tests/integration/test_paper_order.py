"""The paper's order from one recipe: operators, phase 1, phase 2, channels, phase 3. And prune alone on the builtin."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.store import content_sha256, read_artifact, read_header
from tests.commands import CALIBRATION, TRAINING, succeed
from tests.toy import write_toy_clip, write_toy_vae

RECIPE = """
steps:
  - convert-ops: {input: vae.safetensors, output: converted.safetensors, data: clip.mp4}
  - distill:
      name: phase1
      input: converted.safetensors
      phase: 1
      output: phase1.safetensors
      data: clip.mp4
  - distill:
      name: phase2
      input: phase1.safetensors
      phase: 2
      stage_keep_ratios: {up2: 0.5, up3: 0.5}
      output: phase2.safetensors
      data: clip.mp4
  - prune:
      input: phase2.safetensors
      stage_keep_ratios: {up2: 0.5, up3: 0.5}
      data: clip.mp4
  - distill:
      name: phase3
      input: pruned.safetensors
      phase: 3
      data: clip.mp4
"""
ORDER = ("vae", "converted", "phase1", "phase2", "pruned", "flash")


def changed_stages(before: Path, after: Path) -> set[str]:
    """Stages of which some weight differs."""
    (_, old), (_, new) = read_artifact(before), read_artifact(after)
    names = [name for name in new if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])]
    return {name.split(".")[2] for name in names}


def test_the_papers_order(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    (tmp_path / "paper.yaml").write_text(RECIPE, encoding="utf-8")
    succeed(f"convert-ops --recipe paper.yaml {CALIBRATION}", cwd=tmp_path)
    figures = {
        step: succeed(f"distill --recipe paper.yaml --step {step} --num-steps 2 {TRAINING}", cwd=tmp_path)
        for step in ("phase1", "phase2")
    }
    succeed(f"prune --recipe paper.yaml {CALIBRATION}", cwd=tmp_path)
    figures["phase3"] = succeed(f"distill --recipe paper.yaml --step phase3 --num-steps 2 {TRAINING}", cwd=tmp_path)

    files = {name: tmp_path / f"{name}.safetensors" for name in ORDER}
    assert [[p["phase"] for p in one["phases"]] for one in figures.values()] == [[1], [2], [3]]
    assert "l_ce" in figures["phase2"]["phases"][0]["history"][0]
    assert "l_ce" not in figures["phase3"]["phases"][0]["history"][0]
    check_lineage(files)
    # Phase 1 trains the converted deep stages and nothing else; phases 2 and 3 train the whole.
    assert changed_stages(files["converted"], files["phase1"]) == {"mid", "up0", "up1"}
    assert {"mid", "up2", "up3"} <= changed_stages(files["phase1"], files["phase2"])
    assert {"mid", "up2", "up3"} <= changed_stages(files["pruned"], files["flash"])
    headers = {name: read_header(path) for name, path in files.items()}
    assert not headers["phase2"].kept_channels
    assert headers["flash"].kept_channels == headers["pruned"].kept_channels != {}
    prepared = {tensor: tuple(kept) for tensor, kept in headers["phase2"].measured["prepared_channels"].items()}
    assert prepared == headers["pruned"].kept_channels
    assert headers["phase2"].decoder == headers["converted"].decoder
    assert headers["flash"].decoder == headers["pruned"].decoder


def check_lineage(files: dict[str, Path]) -> None:
    """Every file names the one before it, and the first as its original."""
    hashes = {name: content_sha256(path) for name, path in files.items()}
    for before, name in pairwise(ORDER):
        header: ArtifactHeader = read_header(files[name])
        assert header.original is not None
        assert header.original.sha256 == hashes["vae"]
        assert header.parents[0].sha256 == hashes[before]


def test_prune_alone_in_an_empty_folder(tmp_path: Path) -> None:
    """The first sentence of the README, with fewer clips."""
    printed = succeed("prune --ratio 0.25 --num-calibration-clips 1 --num-frames 5 --crop-size 64", cwd=tmp_path)
    assert printed["paths"] == ["pruned.safetensors"]
    assert printed["parameters_after"] < printed["parameters_before"]
    header = read_header(tmp_path / "pruned.safetensors")
    assert header.original is not None and header.original.location == "builtin:tiny-wan"
    assert header.decoder is not None
    widths = {address: layer.out_width for address, layer in header.decoder.layers()}
    assert (widths["up2.0.conv1"], widths["up3.0.conv1"]) == (8, 4)
    # Trained weights: the kept channels explain most of the others even at a quarter.
    streams = {record["group"]: record["r2"] for record in printed["selection"]}
    assert min(streams["up2.stream"], streams["up3.stream"]) > 0.8
