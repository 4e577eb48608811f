"""The optimizer, and how far it moves each parameter: by kind and by magnitude."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.distill.soap import Soap

_SMALLEST_RMS = 1e-5  # zeros must be able to leave zero


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    projections: Iterable[nn.Parameter],
    *,
    held: Collection[str],
    settings: TrainSettings,
) -> torch.optim.Optimizer:
    """The optimizer of a phase; see `parameter_groups` for the arguments."""
    groups = parameter_groups(parameters, projections, held=held, settings=settings)
    if settings.optimizer == "soap":
        return Soap(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


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
        held: names of parameters some of whose rows are held still: weight decay would move these rows although
            their gradient is masked, and so would a rotation of the output channels.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((_rate_scale(parameter, settings), name in held), []).append(parameter)
    found: list[dict[str, Any]] = [
        {"params": members, "rate_scale": scale} | ({"weight_decay": 0.0, "rotate_outputs": False} if is_held else {})
        for (scale, is_held), members in groups.items()
    ]
    if others := list(projections):
        found.append({"params": others, "rate_scale": 1.0})
    return found


def _rate_scale(parameter: nn.Parameter, settings: TrainSettings) -> float:
    """A power of two, so that there are few groups."""
    if settings.max_relative_step is None or settings.optimizer != "adamw" or parameter.ndim < 2:
        return 1.0
    rms = max(float(parameter.detach().float().square().mean().sqrt()), _SMALLEST_RMS)
    longest = settings.max_relative_step * rms
    return min(1.0, 2.0 ** math.floor(math.log2(longest / settings.learning_rate)))
