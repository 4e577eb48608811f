"""Depthwise-separable layers under the names of the released Flash-VAED students, and as our operators have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def fold_separable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite the parts of depthwise-separable layers that our operators lack; exact up to rounding.

    A depthwise bias d moves into the pointwise bias, b + P d: the zero padding comes before the depthwise convolution,
    so d reaches every position. A 1x1x1 depthwise kernel scales the columns of P, which makes a plain pointwise layer.
    Tensors that do not fit each other are left for the strict check to report.
    """
    folded = dict(tensors)
    for name in [name for name in tensors if name.endswith(".depthwise_conv.weight")]:
        place = name.removesuffix(".depthwise_conv.weight")
        depthwise, pointwise = folded[name], folded.get(f"{place}.pointwise_conv.weight")
        bias, depthwise_bias = folded.get(f"{place}.pointwise_conv.bias"), folded.get(f"{place}.depthwise_conv.bias")
        if pointwise is None or bias is None or pointwise.ndim < 2 or pointwise.shape[1] != depthwise.shape[0]:
            continue
        matrix = pointwise.flatten(1).double()  # [O, C]
        if depthwise_bias is not None and matrix.shape == (bias.numel(), depthwise_bias.numel()):
            bias = (bias.double() + matrix @ depthwise_bias.double()).float()
            del folded[f"{place}.depthwise_conv.bias"]
            folded[f"{place}.pointwise_conv.bias"] = bias
        if depthwise.numel() == depthwise.shape[0]:
            for suffix in ("depthwise_conv.weight", "pointwise_conv.weight", "pointwise_conv.bias"):
                folded.pop(f"{place}.{suffix}")
            scaled = (matrix * depthwise.flatten().double()).float()
            folded[f"{place}.weight"] = scaled.reshape(*scaled.shape, 1, 1, 1)
            folded[f"{place}.bias"] = bias
    return folded


def unfold_separable(tensors: Mapping[str, Tensor], *, conv1: str, shortcut: str) -> dict[str, Tensor]:
    """Undo `fold_separable`, so that the released students' classes load a file strictly.

    Every depthwise layer gets a bias of zeros. The shortcut of a depthwise-separable block becomes such a layer too,
    with a depthwise kernel of ones. The frames stay the same.

    Args:
        conv1, shortcut: names of a residual block's first layer and its shortcut.
    """
    unfolded = dict(tensors)
    end = f".{conv1}.depthwise_conv.weight"
    for place in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        weight = unfolded.pop(f"{place}.{shortcut}.weight", None)
        if weight is not None:
            unfolded[f"{place}.{shortcut}.depthwise_conv.weight"] = weight.new_ones(weight.shape[1], 1, 1, 1, 1)
            unfolded[f"{place}.{shortcut}.pointwise_conv.weight"] = weight
            unfolded[f"{place}.{shortcut}.pointwise_conv.bias"] = unfolded.pop(f"{place}.{shortcut}.bias")
    for name in [name for name in unfolded if name.endswith(".depthwise_conv.weight")]:
        unfolded[f"{name.removesuffix('weight')}bias"] = unfolded[name].new_zeros(unfolded[name].shape[0])
    return unfolded
