"""The six commands in a row on a small LTX-Video VAE in diffusers' layout, centred in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.store import read_header
from flashvaed_cli.decoders.cost import total_gflop
from tests.commands import JUDGING, read_report, succeed
from tests.ltx_configs import ltx_config, random_ltx
from tests.toy import write_toy_clip

pytest.importorskip("diffusers", reason="it writes the toy")

CALIBRATION = "--num-calibration-clips 2 --num-frames 9 --crop-size 96"


def test_the_six_commands(tmp_path: Path) -> None:
    random_ltx(ltx_config("0.9.5", 4, 4)).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    write_toy_clip(tmp_path / "clip.mp4", 17, 96, 96)
    analyzed = succeed(
        f"analyze vae --data clip.mp4 {CALIBRATION} --latency-frames 9 --latency-side 32 --num-latency-rounds 1 "
        "--width-latency-s 0",
        cwd=tmp_path,
    )
    assert "up2" in str(analyzed)
    succeed(f"prune vae --ratio 0.5 --data clip.mp4 {CALIBRATION}", cwd=tmp_path)
    succeed(f"convert-ops --data clip.mp4 {CALIBRATION} --num-separable-iterations 1", cwd=tmp_path)
    succeed(
        "distill --num-steps 2 --data clip.mp4 --num-clips 2 --num-frames 9 --crop-size 64 --batch-size 1 "
        "--loss-weight lpips=0",
        cwd=tmp_path,
    )
    succeed(f"eval --data clip.mp4 {JUDGING}", cwd=tmp_path)
    exported = succeed("export --target safetensors", cwd=tmp_path)
    original, flash = (load_checkpoint(tmp_path / name, builtins={}) for name in ("vae", "flash.safetensors"))
    assert original.decoder is not None and flash.decoder is not None
    assert flash.family == "ltx-video-0.9.5" and not flash.decoder.spec.is_causal
    assert flash.decoder.spec.decode_timestep == 0.05
    assert flash.latent_mean == original.latent_mean
    operators = {address: layer.operator for address, layer in flash.decoder.spec.layers()}
    assert operators["mid.0.conv1"] == operators["up0.1.conv2"] == "dwsep3d"
    assert operators["up1.1.conv1"] == "causal3d" and operators["up2.1.conv1"] == "frame2d"
    layers = dict(flash.decoder.spec.layers())
    widths = {name: {layers[f"{name}.{i}.conv1"].out_width for i in range(1, 6)} for name in ("up1", "up2")}
    assert widths == {"up1": {4}, "up2": {2}}
    grid = (2, 3, 3)
    assert total_gflop(flash.decoder.spec, grid) < 0.5 * total_gflop(original.decoder.spec, grid)
    assert read_header(tmp_path / "flash.safetensors").original is not None
    rows = read_report(tmp_path / "report")["clips"]
    assert {row["num_frames"] for row in rows} == {17}
    assert "sees frames ahead" not in str(exported)  # nothing streams without being asked
    again = load_checkpoint(tmp_path / "export" / "flash.safetensors", builtins={})
    assert again.decoder is not None and again.decoder.spec == flash.decoder.spec
