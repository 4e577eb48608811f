"""How to train, whatever the phase: plain values, from which the learning rate of every step follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from flashvaed_cli.distill.losses import LossWeights

Schedule = Literal["constant", "cosine"]
ComputeDType = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "soap"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Attributes:
        num_steps: optimizer steps of the phase, those before a resumption included.
        num_warmup_steps: steps over which the learning rate rises linearly.
        optimizer: soap has betas of its own; see `distill.soap`.
        max_relative_step: AdamW moves every weight by about the learning rate however small the gradient, so a tensor
            of tiny weights would be scrambled: its learning rate is at most this fraction of its weights' root
            mean square at the start of the phase. Biases and gains are exempt. None for no limit. Not for soap.
        schedule: what the learning rate does after that: stay, or fall to `final_rate_frac` of itself.
        gradient_clip_norm: longest gradient that is let through unscaled; None lets all through.
        ema_decay: with it, the student ends with the moving average of its weights.
        compute_dtype: of activations (autocast); weights, losses and optimizer are float32 always.
        channels_last: lay activations out channels-last.
        checkpoint_activations: keep only what passes between the student's blocks, and run each block again in the
            backward pass: less memory, a third more time, the same gradients.
        compile: run the blocks of both decoders by torch.compile.
        adversarial_start: the step at which the adversarial term begins, if it has a weight.
        explosion_factor: stop when a loss is this many times the first one.
        log_every_steps: steps that one entry of the history averages over.
        validate_every_steps: try the student on the validation clips so often, and at start and end.
        checkpoint_every_steps, checkpoint_every_s: save after this many steps or seconds, whichever
            comes first; None for neither. The end of the phase and a signal save in any case.

    Reference: arXiv 2602.19161, section 4 (AdamW, learning rate and weight decay).
    """

    num_steps: int
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_relative_step: float | None = None
    num_warmup_steps: int = 0
    schedule: Schedule = "constant"
    final_rate_frac: float = 0.05
    gradient_clip_norm: float | None = 1.0
    ema_decay: float | None = None
    compute_dtype: ComputeDType = "float32"
    channels_last: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    loss_weights: LossWeights = field(default_factory=LossWeights)
    adversarial_start: int = 0
    discriminator_learning_rate: float = 1e-4
    explosion_factor: float = 100.0
    log_every_steps: int = 5
    validate_every_steps: int | None = None
    checkpoint_every_steps: int | None = 50
    checkpoint_every_s: float | None = None


# Settings that may differ between a run and its resumption: they do not change what is
# computed (`compile` rounds differently).
CADENCE_SETTINGS = frozenset(
    {
        "log_every_steps",
        "validate_every_steps",
        "checkpoint_every_steps",
        "checkpoint_every_s",
        "checkpoint_activations",
        "compile",
        "explosion_factor",
    }
)


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """The learning rate of step `step` (from 0): a function of nothing else, so it needs no state."""
    peak = settings.learning_rate
    if step < settings.num_warmup_steps:
        return peak * (step + 1) / settings.num_warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.num_warmup_steps) / max(1, settings.num_steps - settings.num_warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * (settings.final_rate_frac + (1 - settings.final_rate_frac) * falling)
