"""Which parameters AdamW moves how far: by kind, and by the size that they have."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from flashvaed_cli.distill.settings import TrainSettings

_SMALLEST_RMS = 1e-5  # zeros must be able to leave zero


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    projections: Iterable[nn.Parameter],
    *,
    held: Collection[str],
    settings: TrainSettings,
) -> list[dict[str, Any]]:
    """Groups for the optimizer; `rate_scale` is what the learning rate of a step is multiplied with.

    Args:
        parameters: what trains, by name.
        projections: of the feature loss.
        held: names of parameters some rows of which are held still: weight decay would move these rows although
            their gradient is masked.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((_rate_scale(parameter, settings), name in held), []).append(parameter)
    found: list[dict[str, Any]] = [
        {"params": members, "rate_scale": scale} | ({"weight_decay": 0.0} if is_held else {})
        for (scale, is_held), members in groups.items()
    ]
    if others := list(projections):
        found.append({"params": others, "rate_scale": 1.0})
    return found


def _rate_scale(parameter: nn.Parameter, settings: TrainSettings) -> float:
    """A power of two, so that there are few groups."""
    if settings.max_relative_step is None or parameter.ndim < 2:
        return 1.0
    rms = max(float(parameter.detach().float().square().mean().sqrt()), _SMALLEST_RMS)
    longest = settings.max_relative_step * rms
    return min(1.0, 2.0 ** math.floor(math.log2(longest / settings.learning_rate)))
