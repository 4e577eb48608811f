"""Blocks of gated layers: only the last layer of each branch is solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from flashvaed_cli.decoders.modules.naf_blocks import Ista, Naf, branches_of
from flashvaed_cli.surgery.layer_fit import DenseFit, LayerError, rows_for
from flashvaed_cli.surgery.recording import BLOCK, RecordedRows
from flashvaed_cli.surgery.rows import gather_rows
from flashvaed_cli.surgery.solvers.pair import Clip, Pair


def rows_of_gates(pair: Pair[Naf | Ista]) -> dict[str, int]:
    """Positions of a clip: as many as the neediest branch wants."""
    return {BLOCK: max(rows_for([branch.contract], pair.num_clips) for branch in branches_of(pair.student))}


def solve_naf(pair: Pair[Naf]) -> list[LayerError]:
    """Each branch's last layer, for the output of the original's block less the other summands of the new one."""
    new = pair.student
    return _solve_gates(new, pair, lambda y, rows: (y, rows.outputs[BLOCK]))


def solve_ista(pair: Pair[Ista]) -> list[LayerError]:
    """One naf block after another; the original runs alongside, since both bottlenecks read the same latents."""
    old, new = pair.reference, pair.student

    def reading(place: str) -> Callable[[Clip, RecordedRows], tuple[Clip, Tensor]]:
        def read(y: Clip, rows: RecordedRows) -> tuple[Clip, Tensor]:
            entering = next(given for at, given, _ in new.walk(y) if at == place)
            wanted = next(given for at, given in _unit_outputs(old, y) if at == place)
            return entering, gather_rows(wanted, rows.positions[BLOCK])

        return read

    errors = []
    for place in new.spec.units:
        unit = new.get_submodule(place)
        assert isinstance(unit, Naf)
        errors += _solve_gates(unit, pair, reading(place))
    return errors


def _unit_outputs(block: Ista, y: Clip) -> Iterator[tuple[str, Clip]]:
    """The output of each naf block of a bottleneck, without the residual of its step."""
    for place, entering, _ in block.walk(y):
        yield place, block.get_submodule(place)(entering)


def _solve_gates(
    unit: Naf, pair: Pair[Naf | Ista], read: Callable[[Clip, RecordedRows], tuple[Clip, Tensor]]
) -> list[LayerError]:
    """Fit the last layer of every branch of a naf block.

    Args:
        read: for a clip, the block's input in the new decoder, and the original block's output at the recorded rows.
    """
    if pair.settings.mode == "channel":
        return []
    errors, start = [], 0
    for index, branch in enumerate(branches_of(unit)):
        width = branch.spec.width
        fit = DenseFit([branch.contract], settings=pair.settings)
        for y, rows in pair.clips():
            entering, wanted = read(y, rows)
            mixed, at = unit.mixed(entering), rows.positions[BLOCK]
            target = wanted[:, start : start + width]
            if unit.spec.residual:
                target = target - gather_rows(mixed, at)[:, start : start + width]
            fit.update([branch.inner(unit.parts(mixed)[index])], target, at)
        errors.append(fit.solve_())
        start += width
    return errors
