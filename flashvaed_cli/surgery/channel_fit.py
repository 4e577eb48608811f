"""The lighter reconstruction: fold the map from a layer's kept input channels to all of them into its old kernel.

For each layer only a 1x1 map over its inputs is solved, C x k unknowns instead of a whole kernel, so that
few clips suffice; the kernel itself stays the original's.

Reference: arXiv 2507.21573 folds the combination of dependent filters into the next kernel; arXiv 2602.19161,
section 3.1, puts the same map into the 1x1 shortcuts. Departure: solved layer after layer, on what the new
decoder really feeds the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error, solve_ridge
from flashvaed_cli.surgery.layer_fit import FitSettings, Input, LayerError, Positions
from flashvaed_cli.surgery.rows import gather_rows
from flashvaed_cli.surgery.transfer import Channels, pick, set_kernel_


class ChannelFit:
    """Fit of the map from what a layer reads in the new decoder to all channels that it read in the original.

    Args:
        layer: the new decoder's.
        dense_weight: the original's kernel, over all its channels.
        before: kept channels of the input.
        after: kept channels of the output.
    """

    def __init__(
        self,
        layer: Conv,
        dense_weight: Float[Tensor, "O C kt kh kw"],
        bias: Float[Tensor, " O"],
        *,
        before: Channels,
        after: Channels,
        settings: FitSettings,
    ) -> None:
        self.layer, self.dense_weight, self.bias = layer, dense_weight, bias
        self.before, self.after, self.settings = before, after, settings
        self.address = layer.address
        self.equations = NormalEquations(layer.spec.in_width, dense_weight.shape[1], label=layer.address)

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N C"], positions: Positions) -> None:
        """Add one clip: what the layer reads in the new decoder, and what it reads in the original."""
        self.equations.update(gather_rows(inputs[0], positions), target)

    def solve_(self) -> LayerError:
        """Solve the map, fold it into the kernel, convert that to the layer's operator without data.

        The errors are those of the inputs: with missing channels at zero, and with the map.

        Raises:
            CalibrationError: too few positions, NaN, or a gram that is not positive definite.
        """
        identity = torch.eye(self.dense_weight.shape[1], device=self.dense_weight.device)
        before = relative_error(self.equations, pick(identity, self.before, 1), identity.new_zeros(len(identity)))
        solution = solve_ridge(self.equations, dampening_frac=self.settings.dampening_frac)
        kernel, bias = pick(self.dense_weight, self.after, 0).double(), pick(self.bias, self.after, 0).double()
        folded = torch.einsum("octhw,ck->okthw", kernel, solution.weight.to(kernel))
        set_kernel_(self.layer, folded)
        self.layer.bias.copy_(bias + kernel.sum((2, 3, 4)) @ solution.bias.to(kernel))
        rows, unknowns = self.equations.num_rows, self.equations.num_features + 1
        return LayerError(self.address, before, solution.relative_error, rows, unknowns)
