"""Least-squares gains of norms."""

from __future__ import annotations

import torch

from flashvaed_cli.numerics.norms import fit_gain


def test_gain_minimises_the_error_of_each_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = 2.0 * x + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    gamma = fit_gain((x * y).sum(dim=0), x.square().sum(dim=0))
    expected = torch.cat([torch.linalg.lstsq(x[:, c : c + 1], y[:, c : c + 1]).solution[0] for c in range(4)])
    torch.testing.assert_close(gamma, expected, rtol=1e-12, atol=1e-12)


def test_dead_channels_keep_the_prior() -> None:
    dots, energy = torch.tensor([3.0, 0.0, 1e-16]), torch.tensor([1.0, 0.0, 1e-15])
    assert fit_gain(dots, energy).tolist() == [3.0, 1.0, 1.0]
    assert fit_gain(dots, energy, prior=torch.tensor([9.0, 8.0, 7.0])).tolist() == [3.0, 8.0, 7.0]
    assert fit_gain(torch.zeros(2), torch.zeros(2)).tolist() == [1.0, 1.0]
