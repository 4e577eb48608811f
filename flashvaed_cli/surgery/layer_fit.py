"""Closed-form fits of single layers and norms: accumulate over clips, solve, write the weights.

Reference: flashvaed_cli/README.md, "Method"; arXiv 2602.19161, section 3.1 for the least-squares view.
Departure: whole kernels, ridge, targets of the original and inputs of the new decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.norms import Norm, build_norm
from flashvaed_cli.decoders.modules.operators import Conv, LowRankConv3d, SeparableConv3d
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error, solve_ridge
from flashvaed_cli.numerics.norms import fit_gain
from flashvaed_cli.numerics.reduced_rank import solve_reduced_rank
from flashvaed_cli.numerics.separable import fit_separable
from flashvaed_cli.surgery.rows import dense_rows_per_clip, gather_patches, separable_rows_per_clip
from flashvaed_cli.surgery.transfer import Channels, cut_kernel

MAX_UNCHANGED_FEATURES = 8192
"""Unchanged dense layers with more inputs per output than this keep their weights: the gram alone takes 512 MiB."""

_BLOCK_ELEMENTS = 1 << 26

Input = Float[Tensor, "_B _C _T _H _W"]
Positions = Int64[Tensor, " N"]


@dataclass(frozen=True)
class FitSettings:
    """How layers are solved.

    `mode`: `full` solves whole kernels; `channel` solves only the map from a layer's kept input channels to all that
    it read before, and folds that into its old kernel. `dampening_frac`: the ridge as a fraction of the inputs'
    variance; see `solve_ridge`.
    """

    mode: Literal["channel", "full"] = "full"
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


@runtime_checkable
class LayerFit(Protocol):
    """A fit takes the rows of one clip after another, then solves."""

    address: str

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N O"], positions: Positions) -> None:
        """Add one clip: what each layer reads in the new decoder, and what their sum should be at `positions`."""
        ...

    def solve_(self) -> LayerError:
        """Solve and write the weights into the layers."""
        ...


def num_taps(spec: ConvSpec) -> int:
    """Number of kernel taps per channel."""
    return spec.kernel[0] * spec.kernel[1] * spec.kernel[2]


def _patches(x: Input, spec: ConvSpec, positions: Positions) -> Float[Tensor, "N C taps"]:
    return gather_patches(x, spec.kernel, positions, spec.time_padding, spec.space_padding)


class DenseFit:
    """Fit of one dense layer, or of several whose outputs are added (a block's second convolution and its shortcut).

    The sums are those of the normal equations: memory does not grow with the rows. Weights are damped towards the
    present ones, so directions that the clips leave open (dead channels, too few positions) keep those. The bias
    goes to the first layer.
    """

    def __init__(self, layers: Sequence[Conv], *, settings: FitSettings) -> None:
        self.layers = list(layers)
        self.settings = settings
        self.address = " + ".join(layer.address for layer in layers)
        self.sizes = [layer.spec.in_width * num_taps(layer.spec) for layer in layers]
        self.equations = NormalEquations(sum(self.sizes), layers[0].spec.out_width, label=self.address)

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N O"], positions: Positions) -> None:
        """Add one clip: what each layer reads in the new decoder, and what their sum should be at `positions`."""
        rows = max(_BLOCK_ELEMENTS // sum(self.sizes), 1)
        for part, goal in zip(positions.split(rows), target.split(rows), strict=True):
            patches = [_patches(x, layer.spec, part).flatten(1) for x, layer in zip(inputs, self.layers, strict=True)]
            self.equations.update(torch.cat(patches, dim=1), goal)

    def solve_(self) -> LayerError:
        """Solve and write the weights into the layers.

        Raises:
            CalibrationError: too few positions, NaN, or a gram that is not positive definite.
        """
        weight = torch.cat([layer.weight.flatten(1) for layer in self.layers], dim=1)  # [O, K]
        bias = torch.stack([layer.bias for layer in self.layers]).sum(0)  # [O]
        before = relative_error(self.equations, weight, bias)
        solution = solve_ridge(self.equations, dampening_frac=self.settings.dampening_frac, prior_weight=weight)
        for layer, part in zip(self.layers, solution.weight.split(self.sizes, dim=1), strict=True):
            layer.weight.copy_(part.reshape(layer.weight.shape))
            layer.bias.zero_()
        self.layers[0].bias.copy_(solution.bias)
        rows, unknowns = self.equations.num_rows, self.equations.num_features + 1
        return LayerError(self.address, before, solution.relative_error, rows, unknowns)


class SeparableLayerFit:
    """Fit of one depthwise-separable layer; the sampled patches are held, a bounded number of them."""

    def __init__(
        self, layer: SeparableConv3d, *, dense_weight: Float[Tensor, "O C kt kh kw"] | None, settings: FitSettings
    ) -> None:
        self.layer = layer
        self.dense_weight = dense_weight
        self.settings = settings
        self.address = layer.address
        self.patches: list[Float[Tensor, "n C taps"]] = []
        self.targets: list[Float[Tensor, "n O"]] = []

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N O"], positions: Positions) -> None:
        """Add one clip: what the layer reads in the new decoder, and what it should give at `positions`."""
        self.patches.append(_patches(inputs[0], self.layer.spec, positions))
        self.targets.append(target)

    def solve_(self) -> LayerError:
        """Solve by alternation and write the weights into the layer.

        Raises:
            CalibrationError: too few positions or NaN.
        """
        layer, targets = self.layer, torch.cat(self.targets)
        num_rows = len(targets)
        patches = targets.new_empty(layer.spec.in_width, num_rows, num_taps(layer.spec))  # [C, N, taps]
        start = 0
        for part in self.patches:
            patches[:, start : start + len(part)] = part.transpose(0, 1)
            start += len(part)
        self.patches.clear()
        fit = fit_separable(
            patches,
            targets,
            layer.depthwise[:, 0],
            layer.weight,
            bias0=layer.bias,
            dense_weight=self.dense_weight,
            num_iterations=self.settings.num_separable_iterations,
            dampening_frac=self.settings.dampening_frac,
            label=layer.address,
        )
        layer.depthwise.copy_(fit.depthwise[:, None])
        layer.weight.copy_(fit.pointwise)
        layer.bias.copy_(fit.bias)
        unknowns = layer.spec.in_width + 1
        return LayerError(self.address, fit.start_error, fit.relative_error, num_rows, unknowns)


class LowRankFit:
    """Fit of one low-rank layer: the least squares over all weights of its rank."""

    def __init__(
        self, layer: LowRankConv3d, *, dense_weight: Float[Tensor, "O C kt 1 1"], settings: FitSettings
    ) -> None:
        self.layer, self.settings = layer, settings
        self.prior = dense_weight.flatten(1)
        self.address = layer.address
        self.equations = NormalEquations(self.prior.shape[1], layer.spec.out_width, label=layer.address)

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N O"], positions: Positions) -> None:
        """Add one clip: what the layer reads in the new decoder, and what it should give at `positions`."""
        rows = max(_BLOCK_ELEMENTS // self.prior.shape[1], 1)
        for part, goal in zip(positions.split(rows), target.split(rows), strict=True):
            self.equations.update(gather_patches(inputs[0], self.layer.spec.kernel, part).flatten(1), goal)

    def solve_(self) -> LayerError:
        """Solve and write both factors and the bias into the layer.

        Raises:
            CalibrationError: too few positions, NaN, or a gram that is not positive definite.
        """
        layer, rank = self.layer, self.layer.weight.shape[1]
        before = relative_error(self.equations, layer.weight @ layer.reduce.flatten(1), layer.bias)
        outer, inner, bias = solve_reduced_rank(
            self.equations, rank, dampening_frac=self.settings.dampening_frac, prior_weight=self.prior
        )
        layer.weight.copy_(outer)
        layer.reduce.copy_(inner.reshape(layer.reduce.shape))
        layer.bias.copy_(bias)
        after = relative_error(self.equations, outer @ inner, bias)
        return LayerError(self.address, before, after, self.equations.num_rows, self.equations.num_features + 1)


class MeasuredOnly:
    """Keeps a layer's weights and only measures its error: for unchanged dense layers too large to solve."""

    def __init__(self, layer: Conv) -> None:
        self.layer = layer
        self.address = layer.address
        self.error, self.num_rows = 0.0, 0
        self.sums = torch.zeros(2, layer.spec.out_width, dtype=torch.float64)  # of the targets, and of their squares

    def update(self, inputs: Sequence[Input], target: Float[Tensor, "N O"], positions: Positions) -> None:
        """Add one clip: what the layer reads in the new decoder, and what it should give at `positions`."""
        layer = self.layer
        rows = max(_BLOCK_ELEMENTS // layer.weight[0].numel(), 1)
        for part, goal in zip(positions.split(rows), target.split(rows), strict=True):
            patches = _patches(inputs[0], layer.spec, part).flatten(1)
            given = patches @ layer.weight.flatten(1).T + layer.bias
            self.error += float((given - goal).double().square().sum())
        self.sums += torch.stack([target.double().sum(0), target.double().square().sum(0)]).cpu()
        self.num_rows += len(target)

    def solve_(self) -> LayerError:
        """Return the error of the present weights as both `before` and `after`, with no unknowns."""
        variance = float((self.sums[1] - self.sums[0].square() / max(self.num_rows, 1)).sum())
        share = self.error / variance if variance > 0 else float("inf")
        return LayerError(self.address, share, share, self.num_rows, 0)


class LinearFit:
    """Fit of a linear layer of an attention block, on rows."""

    def __init__(self, linear: nn.Linear, address: str, *, settings: FitSettings) -> None:
        self.linear = linear
        self.settings = settings
        self.equations = NormalEquations(linear.in_features, linear.out_features, label=address)

    def update(self, rows: Float[Tensor, "N C"], target: Float[Tensor, "N O"]) -> None:
        """Add one clip: what the layer reads in the new decoder, and what it should give."""
        self.equations.update(rows, target)

    def solve_(self) -> LayerError:
        """Solve and write the weights.

        Raises:
            CalibrationError: too few positions, NaN, or a gram that is not positive definite.
        """
        before = relative_error(self.equations, self.linear.weight, self.linear.bias)
        solution = solve_ridge(
            self.equations, dampening_frac=self.settings.dampening_frac, prior_weight=self.linear.weight
        )
        self.linear.weight.copy_(solution.weight)
        self.linear.bias.copy_(solution.bias)
        rows, unknowns = self.equations.num_rows, self.equations.num_features + 1
        return LayerError(self.equations.label, before, solution.relative_error, rows, unknowns)


class GainFit:
    """Fit of a norm's gamma, and of its beta if it has one: the new decoder normalises over fewer channels."""

    def __init__(self, norm: Norm) -> None:
        assert norm.gamma is not None
        self.norm, self.gamma = norm, norm.gamma
        self.prior = norm.gamma.detach().cpu().clone()
        width = self.prior.shape[0]
        self.num_rows = 0
        self.sums = torch.zeros(2, width, dtype=torch.float64)  # of x and of y; on the CPU: MPS has no float64
        self.cross = torch.zeros(width, dtype=torch.float64)
        self.energy = torch.zeros_like(self.cross)
        self.unit = build_norm(width, norm.spec.model_copy(update={"shift": False}))
        self.unit.to(norm.gamma.device).requires_grad_(False)

    def update(self, x: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> None:
        """Add one clip: the norm's input in the new decoder, the original norm's output on the kept channels."""
        self.update_normalised(self.unit(x), target)

    def update_normalised(self, normalised: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> None:
        """The same for rows that `unit` has normalised already: a GroupNorm needs whole frames for that."""
        self.num_rows += len(normalised)
        self.sums += torch.stack([normalised.double().sum(0), target.double().sum(0)]).cpu()
        self.cross += (normalised * target).double().sum(0).cpu()
        self.energy += normalised.double().square().sum(0).cpu()

    def solve_(self) -> None:
        """Write gamma and beta; channels without energy (with a beta: without variance) keep theirs."""
        if self.norm.beta is None or self.num_rows == 0:
            self.gamma.copy_(fit_gain(self.cross, self.energy, prior=self.prior))
            return
        x, y = self.sums / self.num_rows
        gain = fit_gain(self.cross - self.num_rows * x * y, self.energy - self.num_rows * x * x, prior=self.prior)
        self.gamma.copy_(gain)
        self.norm.beta.copy_(y - gain * x)


class OperatorFit(NamedTuple):
    """How to fit the layers of an operator whose weights are not a dense kernel.

    Attributes:
        build: makes the fit, from the layer, the original's, the kept channels of the original's input and output,
            and the settings.
        rows_per_clip: number of positions of a clip that the fit uses, for a number of clips.
    """

    build: Callable[[Any, Conv, Channels, Channels, FitSettings], LayerFit]
    rows_per_clip: Callable[[ConvSpec, int], int]


def fit_of_layer(layer: Conv, source: Conv, before: Channels, after: Channels, settings: FitSettings) -> LayerFit:
    """The fit of a whole layer, by its operator.

    Args:
        source: the original's layer.
        before, after: kept channels of what `source` reads, and of what it gives.
    """
    if layer.spec.operator in OPERATOR_FITS:
        return OPERATOR_FITS[layer.spec.operator].build(layer, source, before, after, settings)
    if layer.spec == source.spec and _num_features(layer.spec) > MAX_UNCHANGED_FEATURES:
        return MeasuredOnly(layer)
    return DenseFit([layer], settings=settings)


def rows_for(layers: Sequence[Conv], num_clips: int) -> int:
    """Number of positions of a clip that the fit of these layers, solved as one, uses."""
    if not can_be_joined(layers[0]):
        return OPERATOR_FITS[layers[0].spec.operator].rows_per_clip(layers[0].spec, num_clips)
    return dense_rows_per_clip(sum(_num_features(layer.spec) for layer in layers), num_clips)


def can_be_joined(layer: Conv) -> bool:
    """Whether a layer can be solved as one with another whose output is added to its own."""
    return layer.spec.operator not in OPERATOR_FITS


def _num_features(spec: ConvSpec) -> int:
    return spec.in_width * num_taps(spec)


def _fit_separable(
    layer: SeparableConv3d, source: Conv, before: Channels, after: Channels, settings: FitSettings
) -> LayerFit:
    is_separable = source.spec.operator == layer.spec.operator
    dense = None if is_separable else cut_kernel(source, before, after)
    return SeparableLayerFit(layer, dense_weight=dense, settings=settings)


def _fit_low_rank(
    layer: LowRankConv3d, source: Conv, before: Channels, after: Channels, settings: FitSettings
) -> LayerFit:
    return LowRankFit(layer, dense_weight=cut_kernel(source, before, after), settings=settings)


OPERATOR_FITS: dict[Operator, OperatorFit] = {
    "dwsep3d": OperatorFit(
        _fit_separable,
        lambda spec, num_clips: separable_rows_per_clip(spec.in_width, num_taps(spec), spec.out_width, num_clips),
    ),
    "lowrank3d": OperatorFit(
        _fit_low_rank, lambda spec, num_clips: dense_rows_per_clip(_num_features(spec), num_clips)
    ),
}
"""Operators that `DenseFit` cannot fit."""
