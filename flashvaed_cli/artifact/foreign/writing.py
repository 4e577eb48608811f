"""Our modules as the tensors of other programs' files: the names of a layout, and what those files hold beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.families.layout import Layout


def to_program(
    coders: Iterable[tuple[Mapping[str, Tensor], CoderSpec]],
    layout: Layout,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Tensor]:
    """A whole file in a layout: what `load_checkpoint` reads, and the program whose layout it is.

    Args:
        coders: state dicts with their specs.
        statistics: mean and deviation per latent channel, for layouts that keep them among the weights; both empty
            where nothing tells them.
    """
    tensors: dict[str, Tensor] = {}
    for state, spec in coders:
        tensors |= to_foreign(state, spec, layout)
    if layout.finish is not None:
        tensors = layout.finish(tensors)
    if layout.statistics is not None and all(statistics):
        tensors |= {name: torch.tensor(row) for name, row in zip(layout.statistics, statistics, strict=True)}
    return {f"{layout.prefix}{name}": tensor for name, tensor in tensors.items()}
