"""Our modules as the tensors of other programs' files: under the names of a layout, with latent statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.latent_patches import PATCH, per_place
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import get_family


def to_program(
    coders: Iterable[tuple[Mapping[str, Tensor], CoderSpec]],
    layout: Layout,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Tensor]:
    """The tensors of a whole file in a layout, which `load_checkpoint` and the layout's program can read.

    Args:
        coders: state dicts with their specs.
        statistics: mean and deviation per latent channel, for layouts that keep them among the weights; both empty if
            unknown.
    """
    tensors: dict[str, Tensor] = {}
    coders = list(coders)
    for state, spec in coders:
        tensors |= to_foreign(state, spec, layout)
    if layout.finish is not None:
        tensors = layout.finish(tensors)
    if layout.statistics is not None and all(statistics):
        tensors |= _statistics(layout, statistics, _latent_width(coders, layout))
    return {f"{layout.prefix}{name}": tensor for name, tensor in tensors.items()}


def _latent_width(coders: Iterable[tuple[object, CoderSpec]], layout: Layout) -> int:
    widths = [spec.latent_width for _, spec in coders if isinstance(spec, DecoderSpec | EncoderSpec)]
    return widths[0] if widths else get_family(layout.family).latent_width


def _statistics(
    layout: Layout,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    latent_width: int,
) -> dict[str, Tensor]:
    """Mean and deviation, or variance, under the layout's names."""
    assert layout.statistics is not None
    mean, std = statistics
    if layout.variance_eps is None:
        rows = mean, std
    else:
        rows = tuple(
            per_place(row, latent_width * PATCH**2) for row in (mean, [s * s - layout.variance_eps for s in std])
        )
    return {name: torch.tensor(row) for name, row in zip(layout.statistics, rows, strict=True)}
