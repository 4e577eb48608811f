"""Stop a training run that has gone wrong before it spoils the weights, and say what can be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from flashvaed_cli.distill.checkpoint import TrainState
from flashvaed_cli.errors import DistillationError

_SMALLEST_FIRST_LOSS = 1.0  # a student that starts equal to its teacher may get worse before it gets better
_LARGEST_SUMMAND = 1e30  # of the loss: beyond it, float32 soon holds neither the sum nor its gradient


def require_sane_step(
    values: Mapping[str, Tensor], gradient_norm: float, state: TrainState, checkpoint_path: Path | None
) -> None:
    """Check one step before its gradient is applied; later losses are compared with the first.

    Args:
        values: the step's `loss` and its unweighted terms.
    Raises:
        DistillationError: loss or gradient is not finite, or the loss has exploded.
    """
    loss = float(values["loss"])
    if state.first_loss is None and math.isfinite(loss):
        state.first_loss = loss
    limit = state.settings.explosion_factor * max(state.first_loss or 0.0, _SMALLEST_FIRST_LOSS)
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    elif loss > limit:
        what = f"the loss is {loss:.3g}, {loss / (state.first_loss or 1):.0f} times the first"
    elif not math.isfinite(gradient_norm):
        what = f"the gradient's norm is {gradient_norm}"
    else:
        return
    raise _diverged(what, _advice(values, state), state, checkpoint_path)


def _advice(values: Mapping[str, Tensor], state: TrainState) -> str:
    """What to change: a weight that alone takes the loss out of range, else the learning rate."""
    for name, weight in asdict(state.settings.loss_weights).items():
        if name in values and (value := float(values[name])) < _LARGEST_SUMMAND < weight * value:
            return f"Give --loss-weight {name} a smaller value (now {weight:g})."
    return f"Lower the learning rate (now {state.settings.learning_rate:g}) or look for bad clips."


def _diverged(what: str, advice: str, state: TrainState, checkpoint_path: Path | None) -> DistillationError:
    good = "nothing was saved yet"
    if state.saved_step is not None:
        good = f"the last good checkpoint is {checkpoint_path} (step {state.saved_step})"
    return DistillationError(
        f"Phase {state.phase} stopped at step {state.step + 1} of {state.settings.num_steps}: {what}; {good}. {advice}"
    )
