"""Closed-form fits of single layers and norms: accumulate over clips, solve, write the weights.

Reference: METHOD "closed-form reconstruction"; arXiv 2602.19161, section 3.1 for the least-squares view.
Departure: whole kernels, ridge, targets of the original and inputs of the new decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.operators import ChannelRMSNorm, Conv, SeparableConv3d
from flashvaed_cli.decoders.spec import ConvSpec
from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error, solve_ridge
from flashvaed_cli.numerics.norms import fit_gain
from flashvaed_cli.numerics.separable import fit_separable
from flashvaed_cli.surgery.patches import gather_patches, gather_rows, rows_per_clip, sample_positions

_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class FitSettings:
    """How layers are solved. `dampening_frac`: ridge over the mean diagonal of the gram."""

    dampening_frac: float = 1e-4
    num_separable_iterations: int = 3
    seed: int = 0


@dataclass(frozen=True)
class LayerError:
    """Relative error of a fitted layer on the calibration rows, before and after: ||fit - Y||² / ||Y - mean||²."""

    address: str
    before: float
    after: float
    num_rows: int
    num_unknowns: int


def dense_taps(spec: ConvSpec) -> int:
    """Number of kernel taps per channel."""
    return spec.kernel[0] * spec.kernel[1] * spec.kernel[2]


class LayerFit:
    """Fit of one layer, or of several whose outputs are added (a block's second convolution and its shortcut).

    A depthwise-separable layer is fitted alone. The bias goes to the first layer.
    """

    def __init__(self, layers: Sequence[Conv], *, num_clips: int, settings: FitSettings) -> None:
        self.layers = list(layers)
        self.settings = settings
        self.address = " + ".join(layer.address for layer in layers)
        self.sizes = [layer.spec.in_width * dense_taps(layer.spec) for layer in layers]
        self.max_rows = rows_per_clip(sum(self.sizes), num_clips)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.equations = NormalEquations(sum(self.sizes), layers[0].spec.out_width, label=self.address)

    def update(self, inputs: Sequence[Float[Tensor, "B _C T H W"]], target: Float[Tensor, "B O T H W"]) -> None:
        """Add one clip: what each layer reads in the new decoder, and what their sum should be."""
        b, _, t, h, w = target.shape
        positions = sample_positions((b, t, h, w), self.max_rows, self.generator)
        for part in positions.split(max(_BLOCK_ELEMENTS // sum(self.sizes), 1)):
            patches = [gather_patches(x, layer.spec.kernel, part) for x, layer in zip(inputs, self.layers, strict=True)]
            self.equations.update(torch.cat(patches, dim=1), gather_rows(target, part))

    def solve_(self) -> LayerError:
        """Solve and write the weights into the layers.

        Raises:
            CalibrationError: too few positions, NaN, or a gram that is not positive definite.
        """
        before = relative_error(self.equations, self._dense_weight(), self._bias())
        if isinstance(self.layers[0], SeparableConv3d):
            after = self._solve_separable(self.layers[0])
        else:
            solution = solve_ridge(self.equations, dampening_frac=self.settings.dampening_frac)
            after = solution.relative_error
            for layer, weight in zip(self.layers, solution.weight.split(self.sizes, dim=1), strict=True):
                layer.weight.copy_(weight.reshape(layer.weight.shape))
                layer.bias.zero_()
            self.layers[0].bias.copy_(solution.bias)
        return LayerError(self.address, before, after, self.equations.num_rows, self.equations.num_features + 1)

    def _solve_separable(self, layer: SeparableConv3d) -> float:
        fit = fit_separable(
            self.equations,
            layer.depthwise[:, 0],
            layer.weight,
            num_iterations=self.settings.num_separable_iterations,
            dampening_frac=self.settings.dampening_frac,
        )
        layer.depthwise.copy_(fit.depthwise[:, None])
        layer.weight.copy_(fit.pointwise)
        layer.bias.copy_(fit.bias)
        return fit.relative_error

    def _dense_weight(self) -> Float[Tensor, "O K"]:
        first = self.layers[0]
        if isinstance(first, SeparableConv3d):
            return (first.weight[:, :, None] * first.depthwise.flatten(1)[None]).flatten(1)
        return torch.cat([layer.weight.flatten(1) for layer in self.layers], dim=1)

    def _bias(self) -> Float[Tensor, " O"]:
        return torch.stack([layer.bias for layer in self.layers]).sum(0)


class GainFit:
    """Fit of a norm's gamma: the new decoder normalises over fewer channels than the original."""

    def __init__(self, norm: ChannelRMSNorm) -> None:
        self.norm = norm
        self.prior = norm.gamma.detach().cpu().clone()
        width = self.prior.shape[0]
        self.cross = torch.zeros(width, dtype=torch.float64)  # on the CPU: MPS has no float64
        self.energy = torch.zeros_like(self.cross)
        self.unit = ChannelRMSNorm(width).to(norm.gamma.device).requires_grad_(False)

    def update(self, x: Float[Tensor, "B C T H W"], target: Float[Tensor, "B C T H W"]) -> None:
        """Add one clip: the norm's input in the new decoder, the original norm's output on the kept channels."""
        normalised = self.unit(x)
        self.cross += (normalised * target).sum((0, 2, 3, 4)).cpu().double()
        self.energy += normalised.square().sum((0, 2, 3, 4)).cpu().double()

    def solve_(self) -> None:
        """Write gamma; channels without energy keep theirs."""
        self.norm.gamma.copy_(fit_gain(self.cross, self.energy, prior=self.prior))
