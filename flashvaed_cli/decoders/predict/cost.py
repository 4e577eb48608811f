"""Arithmetic cost and activation memory from the spec alone: no weights, no run.

One multiply-add counts as two operations. Norms, activations and interpolation are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, Grid
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import OPERATOR_FACTS


@dataclass(frozen=True)
class LayerCost:
    """One layer: its operator, floating-point operations and parameters."""

    address: str
    operator: str
    flop: int
    parameters: int


@dataclass(frozen=True)
class StageCost:
    """One stage: its layers and the largest sum of a block's input and output, in elements."""

    name: str
    layers: tuple[LayerCost, ...]
    peak_activation_elements: int

    @property
    def flop(self) -> int:
        """Floating-point operations of the stage."""
        return sum(layer.flop for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of the stage, norms included."""
        return sum(layer.parameters for layer in self.layers)


def stage_costs(spec: CoderSpec, grid: Grid) -> list[StageCost]:
    """Cost of every stage on an input of `grid` (latent frames, height, width; batch 1)."""
    costs = []
    for stage in spec.stages:
        layers: list[LayerCost] = []
        peak, entrance = 0, grid
        held = 0 if stage.bypass is None else _size(grid) * stage.bypass.in_width
        for index, block in enumerate(stage.blocks):
            after = block.grid_after(grid)
            layers += _block_cost(f"{stage.name}.{index}", block, grid)
            entering = after if block.enlarges_first else grid
            around = held if index else 0  # what waits for the end of the bypass; the first block reads the same
            peak = max(peak, _size(entering) * block.in_width + _size(after) * block.widest_output + around)
            grid = after
        if stage.bypass is not None and (conv := stage.bypass.conv) is not None:
            address, flop = f"{stage.name}.{len(stage.blocks) - 1}.bypass", _layer_flop(conv, entrance)
            layers.append(LayerCost(address, conv.operator, flop, conv.parameter_count))
        costs.append(StageCost(stage.name, tuple(layers), peak))
    return costs


def total_gflop(spec: CoderSpec, grid: Grid) -> float:
    """Floating-point operations of a whole run, in 1e9."""
    return sum(stage.flop for stage in stage_costs(spec, grid)) / 1e9


def _size(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _block_cost(address: str, block: BlockSpec, grid: Grid) -> list[LayerCost]:
    if isinstance(block, AttentionSpec):
        return [_attention_cost(address, block, grid)]
    costs = []
    for name, layer in block.layers.items():
        flop = _layer_flop(*block.computed_layer(name, grid)) * block.num_uses(name)
        costs.append(LayerCost(f"{address}.{name}", layer.operator, flop, layer.parameter_count))
    if block.norm_parameters:
        costs.append(LayerCost(f"{address}.norm", "norm", 0, block.norm_parameters))
    return costs


def _layer_flop(layer: ConvSpec, grid: Grid) -> int:
    return 2 * OPERATOR_FACTS[layer.operator].multiplies(layer, grid)


def _attention_cost(address: str, block: AttentionSpec, grid: Grid) -> LayerCost:
    positions = grid[1] * grid[2]
    projections = 4 * block.width * block.inner_width * positions
    frames_read = (grid[0] + 1) / 2 if block.context == "clip" else 1  # by a frame, on average
    mixing = int(2 * positions * positions * frames_read * block.inner_width)
    parameters = 4 * block.width * block.inner_width + 3 * block.inner_width + block.width + block.norm_parameters
    return LayerCost(address, "attention", 2 * (projections + mixing) * grid[0], parameters)
