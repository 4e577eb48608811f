"""Metrics that fail on a clip: left out and said, or an error where they were asked for by name."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.stages.evaluate.judge import ClipJudge, Metrics


@pytest.fixture
def broken(tmp_path: Path) -> str:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho 'no such filter' >&2\nexit 1\n")
    program.chmod(0o755)
    return str(program)


def test_a_clip_keeps_its_other_figures_where_vmaf_fails(broken: str) -> None:
    warnings: list[str] = []
    frames = torch.zeros(3, 200, 32, 32)
    with ExitStack() as stack:
        judge = ClipJudge(Metrics(ffmpeg=broken), 4, stack, warnings.append)
        for part in frames.split(100, dim=1):
            judge.update(part, part + 0.1, part)
        result = judge.to_video()
    assert result is not None and result.vmaf is None and result.num_frames == 200
    assert len(warnings) == 1 and "VMAF: ffmpeg failed" in warnings[0] and "left out for this clip" in warnings[0]


def test_where_vmaf_was_asked_for_its_failure_is_an_error(broken: str) -> None:
    frames = torch.zeros(3, 2, 32, 32)
    with ExitStack() as stack:
        judge = ClipJudge(Metrics(ffmpeg=broken, needs_vmaf=True), 4, stack, pytest.fail)
        with pytest.raises(MetricUnavailableError, match="VMAF: ffmpeg failed"):
            _both(judge, frames)


def _both(judge: ClipJudge, frames: torch.Tensor) -> None:
    judge.update(frames, frames, frames)
    judge.to_video()
