from __future__ import annotations

import torch

from flashvaed_cli.media.procedural import render_frames


def test_same_seed_same_frames() -> None:
    first = torch.stack(list(render_frames(2, 40, 56, seed=1)))
    assert first.shape == (2, 3, 40, 56)
    assert first.abs().max() <= 1
    assert torch.equal(first, torch.stack(list(render_frames(2, 40, 56, seed=1))))
    assert not torch.equal(first, torch.stack(list(render_frames(2, 40, 56, seed=2))))


def test_odd_and_tiny_sizes() -> None:
    assert next(render_frames(1, 33, 17)).shape == (3, 33, 17)
    assert next(render_frames(1, 1, 1)).shape == (3, 1, 1)


def test_it_moves_and_is_varied() -> None:
    clip = torch.stack(list(render_frames(9, 256, 256)), dim=1)
    assert (clip[:, 8] - clip[:, 0]).abs().mean() > 0.05
    assert clip.std() > 0.4
    spectrum = torch.fft.rfft2(clip.mean(dim=(0, 1))).abs()[0, 1:100]
    low, high = spectrum[1:8].mean(), spectrum[50:99].mean()
    assert 10 < low / high < 1000  # falls like a photograph's (1/f: about 16 to 40), neither white nor blurred
