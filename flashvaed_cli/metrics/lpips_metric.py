"""LPIPS, whose backbone comes with no package: found on disk, or downloaded only if the user allows it.

Reference: Zhang et al. 2018, arXiv 1801.03924; the `lpips` package, version 0.1 of its heads.
"""

from __future__ import annotations

import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.errors import MetricUnavailableError

LpipsNet = Literal["alex", "vgg"]
_DOWNLOAD_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Backbone:
    """Where torchvision keeps a backbone, and the smallest side that survives its pooling."""

    file_name: str
    size_mb: int
    min_side: int

    @property
    def hash_prefix(self) -> str:
        """First digits of the SHA-256, which are part of the file name."""
        return Path(self.file_name).stem.rsplit("-", 1)[1]

    @property
    def url(self) -> str:
        """Where torchvision downloads it from."""
        return f"https://download.pytorch.org/models/{self.file_name}"


_BACKBONES: dict[LpipsNet, _Backbone] = {
    "alex": _Backbone("alexnet-owt-7be5be79.pth", size_mb=233, min_side=31),
    "vgg": _Backbone("vgg16-397923af.pth", size_mb=528, min_side=16),
}


class LpipsMetric(nn.Module):
    """Frozen LPIPS network: frames in [-1, 1] to one distance per frame. Gradients reach the frames."""

    def __init__(self, network: nn.Module, net: LpipsNet) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.net: LpipsNet = net
        self.min_side = _BACKBONES[net].min_side

    def forward(self, output: Float[Tensor, "N 3 H W"], reference: Float[Tensor, "N 3 H W"]) -> Float[Tensor, " N"]:
        """Distance of each pair of frames; 0 for equal frames."""
        if min(output.shape[-2:]) < self.min_side:
            raise ValueError(
                f"LPIPS ({self.net}) needs sides of {self.min_side} or more, not {tuple(output.shape[-2:])}"
            )
        return self.network(output, reference).flatten(1).mean(dim=1)


def lpips_checkpoint_path(net: LpipsNet = "alex") -> Path:
    """Where the backbone's weights are looked for: torch's hub folder, set by TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[net].file_name


def load_lpips(
    net: LpipsNet = "alex", device: torch.device | str = "cpu", *, allow_download: bool = False
) -> LpipsMetric:
    """Load LPIPS with its backbone from disk.

    Args:
        net: backbone; `alex` is the usual one for reporting.
        device: where it runs.
        allow_download: fetch a missing backbone from download.pytorch.org. Without it, nothing is downloaded.
    Returns:
        The metric, float32, frozen.
    Raises:
        MetricUnavailableError: no package, no backbone, or one that cannot be read or fetched.
    """
    path = lpips_checkpoint_path(net)
    if not path.is_file():
        if not allow_download:
            raise MetricUnavailableError(
                f"LPIPS ({net}) left out: there is no {path}. {_how_to_get(net)}",
                short=f"its backbone's weights are not here (--allow-download gets them, {_BACKBONES[net].size_mb} MB)",
            )
        _download(net, path)
    try:
        network = _build(net)
    except ImportError as error:
        raise MetricUnavailableError(
            f"LPIPS left out: {error}. Install its packages with `pip install lpips torchvision`."
        ) from error
    _load_backbone(network, net, path)
    return LpipsMetric(network, net).to(device)


def _download(net: LpipsNet, path: Path) -> None:
    backbone = _BACKBONES[net]
    usual_timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)  # torch.hub sets none, and would wait for minutes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(backbone.url, str(path), hash_prefix=backbone.hash_prefix, progress=False)
    except (OSError, RuntimeError) as error:  # no network, full disk; wrong hash
        raise MetricUnavailableError(
            f"LPIPS ({net}): {backbone.url} could not be fetched: {_first_line(error)}. {_how_to_get(net)}"
        ) from error
    finally:
        socket.setdefaulttimeout(usual_timeout_s)


def _build(net: LpipsNet) -> nn.Module:
    """The network with its trained heads and a random backbone, without prints or draws from the global RNG."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision by deprecated arguments
        import lpips

        return cast(nn.Module, lpips.LPIPS(net=net, pnet_rand=True, verbose=False))


def _load_backbone(network: nn.Module, net: LpipsNet, path: Path) -> None:
    """Copy torchvision's `features.N` into the package's slices, which keep the same N."""
    backbone = network.get_submodule("net")
    try:
        features = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        backbone.load_state_dict(
            {name: features["features." + name.split(".", 1)[1]] for name in backbone.state_dict()}
        )
    except Exception as error:  # torch has no common class for broken checkpoints
        raise MetricUnavailableError(
            f"LPIPS ({net}): {path} is not the expected backbone ({_first_line(error)}). "
            f"Remove it and get a fresh copy. {_how_to_get(net)}"
        ) from error


def _how_to_get(net: LpipsNet) -> str:
    backbone = _BACKBONES[net]
    return (
        f"Put {backbone.url} ({backbone.size_mb} MB) at that path, set TORCH_HOME to a folder that has it as "
        f"hub/checkpoints/{backbone.file_name}, or pass --allow-download."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
