"""`analyze` stores the order in which `prune` keeps channels."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvaed_cli.artifact.store import read_header
from tests.commands import succeed
from tests.toy import write_toy_clip, write_toy_vae

CUT = "--data clip.mp4 --num-frames 5 --crop-size 0 --num-calibration-clips 1"


@pytest.mark.parametrize("rule", [None, "greedy-r2", "l1", "random"])
def test_prune_keeps_the_first_of_the_order(tmp_path: Path, rule: str | None) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4", 5, 32, 40)
    flag = "" if rule is None else f"--rule {rule}"
    analyzed = succeed(f"analyze vae.safetensors {CUT} {flag} --width-latency-s 0 --num-latency-rounds 1", cwd=tmp_path)
    assert analyzed["rule"] == (rule or "greedy-energy")
    succeed(f"prune vae.safetensors {CUT} {flag} --ratio 0.5 --reconstruct none", cwd=tmp_path)
    kept = read_header(tmp_path / "pruned.safetensors").kept_channels
    orders = {tensor: record["order"] for record in analyzed["groups"] for tensor in record["tensors"]}
    assert kept
    for tensor, channels in kept.items():
        assert sorted(orders[tensor][: len(channels)]) == list(channels), tensor
