"""The whole state of a training run, written atomically and read without unpickling code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.adversary import Adversary
from flashvaed_cli.distill.averaging import TermAverage, WeightAverage
from flashvaed_cli.distill.features import FeatureMatcher
from flashvaed_cli.distill.settings import CADENCE_SETTINGS, TrainSettings
from flashvaed_cli.errors import DistillationError, TensorFileError
from flashvaed_cli.untrusted.pytorch_file import load_pytorch

_FORMAT = 2

HistoryEntry = dict[str, int | float]


@dataclass
class TrainState:
    """Everything that changes while a phase trains.

    Attributes:
        run_key: the caller's identifier of the run (a hash of recipe and inputs, for example): a
            checkpoint with another one is refused.
        num_ranks: processes that train together.
        step: steps done; also the number of the next batch, and so the position in the data.
        seconds, data_seconds: spent on steps, and on waiting for their batches.
        history: one entry per `log_every_steps`: means of the loss terms, PSNR and more.
        first_loss: the loss that an exploding one is compared with.
        saved_step: the step of this run's checkpoint on disk, if there is one.
    """

    student: Decoder
    matcher: FeatureMatcher
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    adversary: Adversary | None
    phase: int
    settings: TrainSettings
    run_key: str
    num_ranks: int = 1
    step: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    num_clips: int = 0
    first_loss: float | None = None
    saved_step: int | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    terms: TermAverage = field(default_factory=TermAverage)

    @property
    def trained(self) -> list[nn.Parameter]:
        """All parameters that the optimizer moves: the student's, and the projections of the feature loss."""
        return [*self.parameters.values(), *self.matcher.parameters()]

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.parameters()).device


_PARTS: dict[str, type] = {
    "run_key": str, "phase": int, "settings": dict, "num_ranks": int, "counters": dict, "terms": dict,
    "student": dict, "projections": dict, "optimizer": dict, "rng": dict,
}  # fmt: skip
_COUNTERS = ("step", "seconds", "data_seconds", "num_clips", "first_loss", "history")


def save_train_state(state: TrainState, path: Path) -> None:
    """Write the state to `path`; the previous checkpoint stays intact until the new one is complete.

    Raises:
        DistillationError: the disk is full or the folder cannot be written to.
    """
    content = {
        "format": _FORMAT,
        "run_key": state.run_key,
        "phase": state.phase,
        "settings": asdict(state.settings),
        "num_ranks": state.num_ranks,
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "terms": state.terms.state_dict(),
        "student": state.student.state_dict(),
        "projections": state.matcher.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "adversary": None if state.adversary is None else state.adversary.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    try:
        with atomic_path(path) as sibling, sibling.open("wb") as file:
            torch.save(content, file)
    except OSError as error:
        kept = "there is no earlier one" if state.saved_step is None else f"that of step {state.saved_step} is intact"
        raise DistillationError(
            f"The checkpoint of step {state.step} cannot be written to {path} ({error.strerror}); {kept}. "
            "Free some space or choose another folder, then run the same command again."
        ) from error
    state.saved_step = state.step


def load_train_state(state: TrainState, path: Path) -> int:
    """Restore `state` from a checkpoint.

    Returns:
        How many processes had trained it.
    Raises:
        DistillationError: damaged, or of another run, phase, decoder or settings.
    """
    content = _read(path, mapped=False)
    _require_same_run(content, state, path)
    try:
        state.student.load_state_dict(content["student"])
        state.matcher.load_state_dict(content["projections"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        if state.adversary is not None:
            state.adversary.load_state_dict(content["adversary"])
        state.terms.load_state_dict(content["terms"], state.device)
        torch.set_rng_state(content["rng"]["cpu"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DistillationError(
            f"{path} does not fit the decoder to train ({' '.join(str(error).split()):.300}). Delete it to start again."
        ) from error
    for name, value in content["counters"].items():
        setattr(state, name, value)
    state.saved_step = state.step
    if len(content["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["rng"]["cuda"])
    return content["num_ranks"]


@dataclass(frozen=True)
class CheckpointState:
    """How far a checkpoint's run has got."""

    phase: int
    step: int
    num_steps: int

    def __str__(self) -> str:
        return f"phase {self.phase}, {self.step} of {self.num_steps} steps"


def checkpoint_state(path: Path) -> CheckpointState:
    """What a checkpoint holds, without loading its tensors.

    Raises:
        DistillationError: missing or damaged.
    """
    content = _read(path, mapped=True)
    return CheckpointState(content["phase"], content["counters"]["step"], content["settings"]["num_steps"])


def _read(path: Path, *, mapped: bool) -> dict:
    try:
        content = load_pytorch(path, mapped=mapped)
    except (OSError, TensorFileError) as error:
        raise DistillationError(
            f"{path} cannot be read as a checkpoint ({error}). Delete it to start the phase again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DistillationError(f"{path} is not a checkpoint of this version. Delete it to start the phase again.")
    for name, kind in _PARTS.items():
        if not isinstance(content.get(name), kind):
            raise _damaged(path, name)
    if content["counters"].keys() != set(_COUNTERS) or not isinstance(content["counters"]["step"], int):
        raise _damaged(path, "counters")
    if not isinstance(content["settings"].get("num_steps"), int) or not content["rng"].keys() >= {"cpu", "cuda"}:
        raise _damaged(path, "settings or rng")
    return content


def _damaged(path: Path, part: str) -> DistillationError:
    return DistillationError(
        f"{path} is damaged: its {part} are not what was saved. Delete it to start the phase again."
    )


def _require_same_run(content: dict, state: TrainState, path: Path) -> None:
    reasons = []
    if content["phase"] != state.phase:
        reasons.append(f"phase {content['phase']} instead of {state.phase}")
    if content["run_key"] != state.run_key:
        reasons.append("another recipe, decoder or data")
    wanted, saved = asdict(state.settings), content["settings"]
    if isinstance(saved.get("loss_weights"), dict):  # lacks terms that were added later
        saved = {**saved, "loss_weights": {**dict.fromkeys(wanted["loss_weights"], 0.0), **saved["loss_weights"]}}
    reasons += [
        f"{name} {value} instead of {wanted.get(name)}"
        for name, value in saved.items()
        if name not in CADENCE_SETTINGS and value != wanted.get(name)
    ]
    if reasons:
        raise DistillationError(
            f"{path} belongs to another run ({'; '.join(reasons)}). Give the settings it was made with to go on, "
            "or delete it (or set resume to never) to start over."
        )
