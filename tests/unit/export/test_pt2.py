"""`torch.export` programs: written, loaded again, compared at sizes other than the traced one."""

from __future__ import annotations

from pathlib import Path

import torch
from small_decoders import flash_spec, small_decoder

from flashvaed_cli.decoders.streaming import decode
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.export.pt2 import export_pt2


def test_clip_and_steps_take_any_size(tmp_path: Path) -> None:
    decoder = small_decoder(flash_spec())
    result = export_pt2(decoder, tmp_path / "x.pt2")
    assert [path.name for path in result.paths] == ["x.pt2", "x.step.first.pt2", "x.step.next.pt2"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in result.paths}
    assert 0 < result.max_abs_difference <= result.tolerance
    latents = seeded_latents(decoder.spec, (5, 2, 3), seed=4, batch=1)
    frames = torch.export.load(result.path).module()(latents)
    torch.testing.assert_close(frames, decode(decoder, latents), atol=1e-5, rtol=0)
