"""The Fréchet distance against its closed form, and features of networks as they are published."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.metrics.frechet import (
    FeatureExtractor,
    FeatureStatistics,
    frechet_distance,
    load_extractor,
    needs_more_samples,
)

CPU = torch.device("cpu")


def statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    for part in rows.split(7):
        found.add(part)
    return found


def test_normal_distributions_on_axes_have_a_closed_form() -> None:
    """Independent features: sum of (m1 - m2)^2 + (s1 - s2)^2, exact in the sample moments."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    rows -= rows.mean(0)
    rows, _ = torch.linalg.qr(rows)  # orthogonal columns with mean 0: a diagonal covariance
    one = rows * torch.tensor([1.0, 2.0, 0.5]) * 7 + torch.tensor([0.0, 1.0, 2.0])
    other = rows * torch.tensor([3.0, 2.0, 0.1]) * 7 + torch.tensor([1.0, 1.0, -1.0])
    deviations = (one.std(0) - other.std(0)).square().sum()
    expected = float((one.mean(0) - other.mean(0)).square().sum() + deviations)
    assert frechet_distance(statistics(one), statistics(other)) == pytest.approx(expected, rel=1e-9)


def test_it_is_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(1)
    one = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    other = one @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.3
    cov = [rows.T.cov().numpy() for rows in (one, other)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = np.real(cast(Any, sqrtm(cov[0] @ cov[1])))
    expected = float((one.mean(0) - other.mean(0)).square().sum()) + (cov[0] + cov[1] - 2 * root).trace()
    assert frechet_distance(statistics(one), statistics(other)) == pytest.approx(expected, rel=1e-8)


def test_equal_and_constant_features_have_distance_zero() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(statistics(rows), statistics(rows)) == pytest.approx(0, abs=1e-9)
    flat = torch.ones(5, 4)
    assert frechet_distance(statistics(flat), statistics(flat)) == 0
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(statistics(rows[:1]), statistics(rows))


def test_statistics_of_parts_add_up() -> None:
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    whole, parts = statistics(rows), FeatureStatistics.added_up([statistics(rows[:11]), statistics(rows[11:])])
    assert frechet_distance(whole, parts) == pytest.approx(0, abs=1e-12)
    assert parts.count == 30


def test_few_samples_are_warned_of() -> None:
    assert needs_more_samples(401, 400) is None
    assert "from 400 samples of 400 features" in str(needs_more_samples(400, 400))


class ClipNetwork(nn.Module):
    """Takes clips as published I3D files do."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("not as it should be called")
        return torch.stack([x.mean(dim=(1, 2, 3, 4)), x.amax(dim=(1, 2, 3, 4))], dim=1)


class ImageNetwork(nn.Module):
    """Takes bytes, and gives maps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()[:, :, ::4, ::4]


def saved(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises newer formats
        torch.jit.script(network).save(str(path))
    return path


def extractor(path: Path, takes: str = "clip", pixels: str = "signed") -> FeatureExtractor:
    return load_extractor(path, CPU, takes=takes, num_frames=4, size=16, pixels=pixels)  # type: ignore[arg-type]


def test_a_clip_network_is_called_with_arguments_that_it_has(tmp_path: Path) -> None:
    network = extractor(saved(ClipNetwork(), tmp_path / "i3d.pt"))
    found = network(torch.full((3, 4, 20, 30), 0.5))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]]))


def test_an_image_network_gives_a_row_per_frame(tmp_path: Path) -> None:
    network = extractor(saved(ImageNetwork(), tmp_path / "fid.pt"), takes="image", pixels="bytes")
    found = network(torch.full((3, 4, 20, 30), -1.0))
    assert found.shape == (4, 3) and not found.any()


def test_what_is_no_network_or_refuses_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(MetricUnavailableError, match="no TorchScript network"):
        extractor(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(MetricUnavailableError, match="no TorchScript network"):
        extractor(tmp_path / "text.pt")
    network = extractor(saved(ClipNetwork(), tmp_path / "i3d.pt"), takes="image")
    with pytest.raises(MetricUnavailableError, match=r"does not take \[4, 3, 16, 16\].*--features-input"):
        network(torch.zeros(3, 4, 20, 30))
