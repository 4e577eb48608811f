"""Fréchet distance between the features of two sets of videos or images, with any TorchScript network: FVD, FID and
the like.

It is the distance between two normal distributions with the features' mean and covariance (centred, over N - 1).
At equal quality it falls with the number of samples, so compare only figures from the same number.

Reference: Heusel et al. 2017, arXiv 1706.08500 (FID); Unterthiner et al. 2018, arXiv 1812.01717 (FVD).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.errors import MetricUnavailableError

FeatureInput = Literal["clip", "image"]
PixelRange = Literal["signed", "unit", "bytes"]

_MAX_WIDTH = 8192
# Arguments of published extractors, and the values passed: flashvaed resizes and scales by itself.
_KNOWN_ARGUMENTS = {"return_features": True, "rescale": False, "resize": False}


class FeatureStatistics:
    """Sums from which mean and covariance of features follow; those of several processes can be added up."""

    def __init__(self, width: int) -> None:
        """Start empty.

        Args:
            width: of a feature vector.
        """
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N D"]) -> None:
        """Add samples."""
        rows = features.detach().double().cpu()
        self.count += rows.shape[0]
        self.total += rows.sum(dim=0)
        self.outer += rows.T @ rows

    @staticmethod
    def added_up(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
        """The statistics of all samples together."""
        together = FeatureStatistics(len(parts[0].total))
        for part in parts:
            together.count += part.count
            together.total += part.total
            together.outer += part.outer
        return together

    def moments(self) -> tuple[Float64[Tensor, " D"], Float64[Tensor, "D D"]]:
        """Mean and centred covariance.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError("a covariance needs two samples")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); 0 for equal statistics.

    Raises:
        ValueError: fewer than two samples on a side.
    """
    (mean_1, cov_1), (mean_2, cov_2) = one.moments(), other.moments()
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # symmetric, so the product below is too
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(float(distance), 0.0)


def needs_more_samples(num_samples: int, width: int) -> str | None:
    """A warning if the covariance cannot have full rank; None if it can."""
    if num_samples > width:
        return None
    return (
        f"Fréchet distance from {num_samples} samples of {width} features: the covariance is rank-deficient, so "
        f"distances are too large and only comparable at the same number. Judge more than {width} windows"
    )


@dataclass(frozen=True)
class FeatureExtractor:
    """A TorchScript network from frames to one feature vector per clip window or image.

    Attributes:
        takes: windows of `num_frames` frames `[N, 3, T, S, S]`, or images `[N, 3, S, S]`.
        size: side S that frames are resized to (bilinear, antialiased, whole frame).
        pixels: the range it expects: [-1, 1], [0, 1], or bytes.
    """

    network: Any
    arguments: dict[str, bool]
    device: torch.device
    takes: FeatureInput
    num_frames: int
    size: int
    pixels: PixelRange

    @torch.no_grad()
    def __call__(self, frames: Float[Tensor, "3 T H W"]) -> Float[Tensor, "N D"]:
        """Features of a window (one row) or of every frame of it (T rows); frames in [-1, 1].

        Raises:
            MetricUnavailableError: the network refuses the frames, or does not return vectors.
        """
        x = functional.interpolate(
            frames.transpose(0, 1).float().to(self.device),
            size=(self.size, self.size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        ).clamp(-1, 1)  # [T, 3, S, S]
        if self.pixels != "signed":
            x = (x + 1) / 2
        if self.pixels == "bytes":
            x = (x * 255).round().to(torch.uint8)
        if self.takes == "clip":
            x = x.transpose(0, 1)[None]  # [1, 3, T, S, S]
        try:
            found = self.network(x, **self.arguments)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise MetricUnavailableError(
                f"--features: the network does not take {list(x.shape)} {x.dtype}: {reason}. "
                "Check --features-input, --features-size and --features-range."
            ) from error
        features = found[0] if isinstance(found, tuple | list) else found
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(x):
            raise MetricUnavailableError(f"--features: the network gives no vector per {self.takes}.")
        features = features.float().flatten(2).mean(2) if features.ndim > 2 else features.float()
        if features.shape[1] > _MAX_WIDTH:
            raise MetricUnavailableError(
                f"--features: {features.shape[1]} features per {self.takes}; at most {_MAX_WIDTH} make a covariance."
            )
        return features


def load_extractor(
    path: str | Path, device: torch.device, *, takes: FeatureInput, num_frames: int, size: int, pixels: PixelRange
) -> FeatureExtractor:
    """Load a TorchScript file. It is a program: use only files that you trust.

    Raises:
        MetricUnavailableError: absent, or not TorchScript.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises newer formats
            network = torch.jit.load(str(path), map_location=device).eval()
        names = {argument.name for argument in network.forward.schema.arguments}
    except Exception as error:  # torch raises ValueError, RuntimeError and others
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise MetricUnavailableError(f"--features {path}: no TorchScript network: {reason}") from error
    known = {name: value for name, value in _KNOWN_ARGUMENTS.items() if name in names}
    return FeatureExtractor(network, known, device, takes, num_frames, size, pixels)
