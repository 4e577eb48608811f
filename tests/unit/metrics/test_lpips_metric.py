from __future__ import annotations

import time
from pathlib import Path

import lpips  # noqa: F401  imported here so that no single test pays for it
import pytest
import torch
import torchvision
from torch import Tensor

from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.metrics.lpips_metric import LpipsMetric, load_lpips, lpips_checkpoint_path
from flashvaed_cli.metrics.quality import compare_frames


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path


@pytest.fixture(scope="module")
def alexnet_weights() -> dict[str, Tensor]:
    """A whole AlexNet checkpoint with random features; the classifier, which LPIPS leaves alone, takes no space."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.alexnet(weights=None)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.05
        if name.startswith("features")
        else torch.zeros(1).expand(value.shape)
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def metric(torch_home: Path, alexnet_weights: dict[str, Tensor]) -> LpipsMetric:
    path = lpips_checkpoint_path("alex")
    path.parent.mkdir(parents=True)
    torch.save(alexnet_weights, path)
    return load_lpips("alex")


@pytest.mark.parametrize(("net", "file_name"), [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth")])
def test_a_missing_backbone_is_named_at_once(torch_home: Path, net: str, file_name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(MetricUnavailableError) as caught:
        load_lpips(net)  # type: ignore[arg-type]
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert str(torch_home / "hub" / "checkpoints" / file_name) in message
    assert f"https://download.pytorch.org/models/{file_name}" in message
    assert "--allow-download" in message
    assert not list(torch_home.rglob("*"))


def test_loads_the_backbone_from_disk_in_silence(
    metric: LpipsMetric, alexnet_weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert capsys.readouterr() == ("", "")
    loaded = metric.network.get_submodule("net").state_dict()
    assert loaded
    assert all(
        torch.equal(value, alexnet_weights["features." + name.split(".", 1)[1]]) for name, value in loaded.items()
    )
    assert not metric.network.training
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_distance_is_per_frame_with_gradients_and_zero_for_equal_frames(metric: LpipsMetric) -> None:
    reference = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(metric(reference, reference), torch.zeros(2))
    output = (reference + torch.tensor([0.1, 0.5]).view(2, 1, 1, 1)).requires_grad_()
    distances = metric(output, reference)
    assert distances.shape == (2,)
    assert 0 < distances[0] < distances[1]
    distances.sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0


def test_small_frames(metric: LpipsMetric) -> None:
    smallest = torch.rand(1, 3, metric.min_side, metric.min_side)
    assert torch.isfinite(metric(smallest, -smallest)).all()
    with pytest.raises(ValueError, match="31 or more"):
        metric(smallest[..., :-1], smallest[..., :-1])
    frames = torch.rand(3, 2, 32, 32)
    assert compare_frames(frames, -frames, lpips=metric, lpips_min_side=metric.min_side).lpips is not None


def test_loading_leaves_the_random_state_alone(torch_home: Path, alexnet_weights: dict[str, Tensor]) -> None:
    path = lpips_checkpoint_path("alex")
    path.parent.mkdir(parents=True)
    torch.save(alexnet_weights, path)
    before = torch.get_rng_state()
    load_lpips("alex")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_backbone_is_named(torch_home: Path, content: bytes | None) -> None:
    path = lpips_checkpoint_path("alex")
    path.parent.mkdir(parents=True)
    if content is None:
        torch.save({"features.0.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(MetricUnavailableError, match="not the expected backbone") as caught:
        load_lpips("alex")
    assert str(path) in str(caught.value)


def test_an_allowed_download_that_fails_says_how_else(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, path: str, **_: object) -> None:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(MetricUnavailableError, match=r"no route to host.*TORCH_HOME"):
        load_lpips("alex", allow_download=True)
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"]
