"""How each kind of block is solved.

A solver reads the inputs of the block in the new decoder and the recorded rows of the original. It fits one layer
after another and writes the weights, so that each layer is fitted to the new outputs of those before it.

Reference: flashvaed_cli/README.md, "Method".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flashvaed_cli.surgery.layer_fit import LayerError
from flashvaed_cli.surgery.solvers.gates import rows_of_gates, solve_ista, solve_naf
from flashvaed_cli.surgery.solvers.pair import Pair
from flashvaed_cli.surgery.solvers.residual import (
    rows_of_attention,
    rows_of_chain,
    rows_of_resblock,
    solve_attention,
    solve_chain,
    solve_resblock,
)
from flashvaed_cli.surgery.solvers.single import (
    solve_cells,
    solve_conv,
    solve_downsample,
    solve_head,
    solve_shuffle,
    solve_upsample,
)
from flashvaed_cli.surgery.solvers.steps import rows_of_convolutions


class BlockSolver(NamedTuple):
    """How a pair of blocks of one kind is solved; the pair's type is that of the kind's module.

    Attributes:
        num_rows: how many positions of a clip to record, by the name of the layer or norm, and for `BLOCK`.
        solve: fits the layers in place; returns one line per solved layer.
    """

    num_rows: Callable[[Pair[Any]], dict[str, int]]
    solve: Callable[[Pair[Any]], list[LayerError]]


_KEPT_CELLS = BlockSolver(lambda _: {}, lambda _: [])
"""The layers between cells and channels keep their weights: their inputs have been fitted to the original's."""

BLOCK_SOLVERS: dict[str, BlockSolver] = {
    "resblock": BlockSolver(rows_of_resblock, solve_resblock),
    "chain": BlockSolver(rows_of_chain, solve_chain),
    "attention": BlockSolver(rows_of_attention, solve_attention),
    "upsample": BlockSolver(rows_of_convolutions, solve_upsample),
    "shuffle_upsample": BlockSolver(rows_of_convolutions, solve_shuffle),
    "cell_upsample": BlockSolver(rows_of_convolutions, solve_cells),
    "downsample": BlockSolver(rows_of_convolutions, solve_downsample),
    "head": BlockSolver(rows_of_convolutions, solve_head),
    "conv": BlockSolver(rows_of_convolutions, solve_conv),
    "naf": BlockSolver(rows_of_gates, solve_naf),
    "ista": BlockSolver(rows_of_gates, solve_ista),
    "cell_stem": _KEPT_CELLS,
    "cell_head": _KEPT_CELLS,
}
