"""Stop a training run that has gone wrong before it spoils the weights, and say what can be saved."""

from __future__ import annotations

import math
from pathlib import Path

from flashvaed_cli.distill.checkpoint import TrainState
from flashvaed_cli.errors import DistillationError

_SMALLEST_FIRST_LOSS = 1.0  # a student that starts equal to its teacher may get worse before it gets better


def require_sane_step(loss: float, gradient_norm: float, state: TrainState, checkpoint_path: Path | None) -> None:
    """Check one step before its gradient is applied; later losses are compared with the first.

    Raises:
        DistillationError: loss or gradient is not finite, or the loss has exploded.
    """
    if state.first_loss is None and math.isfinite(loss):
        state.first_loss = loss
    limit = state.settings.explosion_factor * max(state.first_loss or 0.0, _SMALLEST_FIRST_LOSS)
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss}", state, checkpoint_path)
    if loss > limit:
        times = loss / (state.first_loss or 1)
        raise _diverged(f"the loss is {loss:.3g}, {times:.0f} times the first", state, checkpoint_path)
    if not math.isfinite(gradient_norm):
        raise _diverged(f"the gradient's norm is {gradient_norm}", state, checkpoint_path)


def _diverged(what: str, state: TrainState, checkpoint_path: Path | None) -> DistillationError:
    good = "nothing was saved yet"
    if state.saved_step is not None:
        good = f"the last good checkpoint is {checkpoint_path} (step {state.saved_step})"
    return DistillationError(
        f"Phase {state.phase} stopped at step {state.step + 1} of {state.settings.num_steps}: {what}; {good}. "
        f"Lower the learning rate (now {state.settings.learning_rate:g}) or look for bad clips."
    )
