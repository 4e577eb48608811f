"""`torch.export` programs: written, loaded again, compared at sizes other than the traced one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from counting_progress import CountingProgress
from small_decoders import flash_spec, shortest_spec, small_decoder

from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.export.pt2 import export_aoti, export_pt2


def test_clip_and_steps_take_any_size(tmp_path: Path) -> None:
    decoder = small_decoder(flash_spec())
    progress = CountingProgress()
    result = export_pt2(decoder, tmp_path / "x.pt2", progress=progress)
    assert [path.name for path in result.paths] == ["x.pt2", "x.step.first.pt2", "x.step.next.pt2"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in result.paths}
    assert 0 < result.max_abs_difference <= result.tolerance
    latents = seeded_latents(decoder.spec, (5, 2, 3), seed=4, batch=1)
    frames = torch.export.load(result.path).module()(latents)
    torch.testing.assert_close(frames, decode(decoder, latents), atol=1e-5, rtol=0)
    assert progress.totals == progress.done == {"pt2": 4}
    assert progress.said == ["tracing clip", "tracing step.first", "tracing step.next", "checking"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_package_takes_any_size(tmp_path: Path) -> None:
    """Of a decoder of single images, which is one graph: compiling takes half a minute, and graphs are tested above."""
    decoder = still_decoder(small_decoder(shortest_spec()))
    result = export_aoti(decoder, tmp_path / "x.aoti.pt2")
    assert [path.name for path in result.paths] == ["x.aoti.pt2"]
    assert 0 < result.max_abs_difference <= result.tolerance
    latents = seeded_latents(decoder.spec, (1, 4, 3), seed=4, batch=1)
    frames = torch._inductor.aoti_load_package(str(result.path))(latents)
    torch.testing.assert_close(frames, decode(decoder, latents), atol=1e-4, rtol=0)


def test_without_a_compiler_the_package_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DecodeError, match="needs a C\\+\\+ compiler"):
        export_aoti(small_decoder(flash_spec()), tmp_path / "x.aoti.pt2")
    assert not any(tmp_path.iterdir())
