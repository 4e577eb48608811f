from __future__ import annotations

from pathlib import Path

import torch

import flashvaed_cli
from flashvaed_cli.media.procedural import DEMO_FPS, DEMO_NUM_FRAMES, DEMO_SEED, DEMO_SIDE, render_frames
from flashvaed_cli.media.video import probe_video, read_clip

SHIPPED = Path(flashvaed_cli.__file__).parent / "zoo" / "data" / "demo.mp4"


def test_same_seed_same_frames() -> None:
    first = torch.stack(list(render_frames(2, 40, 56, seed=1)))
    assert first.shape == (2, 3, 40, 56)
    assert first.abs().max() <= 1
    assert torch.equal(first, torch.stack(list(render_frames(2, 40, 56, seed=1))))
    assert not torch.equal(first, torch.stack(list(render_frames(2, 40, 56, seed=2))))


def test_odd_and_tiny_sizes() -> None:
    assert next(render_frames(1, 33, 17)).shape == (3, 33, 17)
    assert next(render_frames(1, 1, 1)).shape == (3, 1, 1)


def test_shipped_clip_is_what_the_code_renders() -> None:
    info = probe_video(SHIPPED)
    assert (info.height, info.width, info.num_frames, info.fps) == (DEMO_SIDE, DEMO_SIDE, DEMO_NUM_FRAMES, DEMO_FPS)
    assert SHIPPED.stat().st_size < 400_000
    rendered = next(render_frames(1, DEMO_SIDE, DEMO_SIDE, DEMO_SEED))
    luma = torch.tensor([0.2126, 0.7152, 0.0722]).reshape(3, 1, 1)  # 4:2:0 halves the colours' resolution, not this
    error = ((read_clip(SHIPPED, num_frames=1)[:, 0] - rendered) * luma).sum(dim=0)
    assert error.square().mean() < 4 * 10 ** (-34 / 10)  # 34 dB on the range of 2, usual for H.264 at crf 18


def test_it_moves_and_is_varied() -> None:
    clip = read_clip(SHIPPED, num_frames=9)
    assert (clip[:, 8] - clip[:, 0]).abs().mean() > 0.05
    assert clip.std() > 0.4
    spectrum = torch.fft.rfft2(clip.mean(dim=(0, 1))).abs()[0, 1:100]
    low, high = spectrum[1:8].mean(), spectrum[50:99].mean()
    assert 10 < low / high < 1000  # falls like a photograph's (1/f: about 16 to 40), neither white nor blurred
