"""Checks on the values of weights that are read."""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.limits import MAX_WEIGHT


def require_usable_weights(coder: Coder, location: str) -> None:
    """Refuse weights that no coder can use.

    Args:
        location: where they come from, for the message.
    Raises:
        ArtifactError: NaN, infinite or larger than `MAX_WEIGHT`; names the layer.
    """
    for name, parameter in coder.named_parameters():
        low, high = torch.aminmax(parameter.detach())
        if bool((low >= -MAX_WEIGHT) & (high <= MAX_WEIGHT)):  # false for NaN
            continue
        is_finite = bool(torch.isfinite(low) & torch.isfinite(high))
        found = f"{max(low, high, key=abs):.2g}, far beyond any weight" if is_finite else "NaN or infinite values"
        raise ArtifactError(
            f"{location}: {name.removeprefix('stages.')} of the {coder.spec.role} holds {found}; "
            "the file is damaged, or its number format too narrow: download it or make it again"
        )
