"""Layers whose outputs lie in another order in files."""

from __future__ import annotations

from math import prod

from torch import Tensor


def reorder_rows(tensors: dict[str, Tensor], layer: str, parts: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Take the outputs of a layer for a grid of `parts` (one of them -1), and read them with its axes in `order`.

    A weight or bias that is absent, or has no such grid, stays: the comparison of shapes tells of it by name.
    """
    for name in (f"{layer}.weight", f"{layer}.bias"):
        tensor = tensors.get(name)
        if tensor is not None and tensor.ndim and tensor.shape[0] % prod(part for part in parts if part > 0) == 0:
            grid = tensor.unflatten(0, parts)
            tensors[name] = grid.movedim(order, tuple(range(len(parts)))).flatten(0, len(parts) - 1)
