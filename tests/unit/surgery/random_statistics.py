"""Statistics as an analysis holds them, of no decoder in particular."""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.numerics.covariance import TensorStatistics


def random_statistics(spec: CoderSpec, seed: int = 0) -> dict[str, TensorStatistics]:
    """Full-rank covariances of different loudness, and means, for every tensor of the groups of a spec."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for tensor, width in tensor_widths(spec).items():
        rows = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
        covariance = rows.T @ rows / len(rows) * 10.0 ** float(torch.randn((), generator=generator))
        mean = torch.randn(width, generator=generator, dtype=torch.float64)
        statistics[tensor] = TensorStatistics(covariance, mean, len(rows))
    return statistics
