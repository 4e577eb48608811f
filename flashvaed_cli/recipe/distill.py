"""The settings of `flashvaed distill`: the phases, the weights of the loss, and the run as a whole."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from flashvaed_cli.recipe.fields import (
    BUILTIN_VAE,
    CONVERTED_FILE,
    FLASH_FILE,
    PRUNED_FILE,
    Buckets,
    CacheDType,
    Count,
    Name,
    Names,
    NonNegative,
    OptionalCount,
    OptionalPositive,
    PhaseChoice,
    Positive,
    StudentShape,
    StudentStart,
    Switch,
    WholeNumber,
    int_as_text,
)
from flashvaed_cli.recipe.settings import ClipFields, FrozenModel, RatioFields, StageRecipe

_FEWEST_WARMUP_STEPS = 20
NEW_STUDENT_LEARNING_RATE = 3e-3
"""For a new decoder. Measured on builtin:tiny-wan, tae of width 16, 80 steps of soap on four clips of 5x64x64, in dB to
the original: 23.8 with 1e-3, 27.5 with 3e-3, 27.8 with 1e-2; from a random start 25.1 with 3e-3."""


class LossWeightSettings(FrozenModel):
    """Weight of every term of the distillation loss; 0 switches a term off.

    Reference: arXiv 2602.19161 for L1, LPIPS, feature, SSIM and L_ce; the others are ours.
    """

    l1: NonNegative = Field(default=10.0, description="Mean absolute difference of pixels.")
    mse: NonNegative = Field(default=0.0, description="Mean squared difference of pixels; around 1e-3 in size.")
    lpips: NonNegative = Field(default=2.0, description="Perceptual distance; needs the backbone's weights.")
    feature: NonNegative = Field(default=1.0, description="Mean absolute difference of stage features.")
    ssim: NonNegative = Field(default=5.0, description="1 - SSIM.")
    l_ce: NonNegative = Field(default=1.0, description="1 - R2 of all channels given the kept ones; phase 2 only.")
    sharpness: NonNegative = Field(default=0.0, description="Difference of Laplacian pyramids.")
    energy: NonNegative = Field(
        default=0.0,
        description="Logarithm of the ratio of Laplacian energies, against softness; 0.002 with mse 1, for example.",
    )
    temporal: NonNegative = Field(default=0.0, description="Difference of frame-to-frame changes.")
    wavelet: NonNegative = Field(default=0.0, description="Difference of Haar bands in time and space.")
    adversarial: NonNegative = Field(
        default=0.0,
        description="Against a patch discriminator that trains alongside the decoder. LeanVAE gives it "
        "a twentieth of the weight of l1.",
    )


class PhaseRecipe(FrozenModel):
    """One phase of distillation."""

    phase: Literal[1, 2, 3] = Field(
        description="1: converted deep stages. 2: everything, before pruning, with L_ce. 3: everything, after pruning."
    )
    num_steps: Count = Field(default=100, description="Optimizer steps.")
    learning_rate: Positive = Field(default=3e-4, description="Learning rate of the optimizer.")


class DistillRecipe(ClipFields, RatioFields, StageRecipe):
    """Settings of `flashvaed distill`; ratios and rule choose the channels that phase 2 prepares for pruning."""

    command: ClassVar[str] = "distill"
    default_inputs: ClassVar[tuple[str, ...]] = (CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to train: a file, folder, hf:// address or builtin:NAME."
    )
    student: StudentShape | None = Field(
        default=None,
        description="Instead of the input, train a new, light decoder for the latents of the input's original: tae "
        "(like TAESD: no norms, no attention), temporal-tae (with causal layers over three frames and RMS norms; "
        "the published one is not causal), efficientvit (like DC-AE's, without attention) or lean (like LeanVAE's, "
        "for the grid of Wan 2.1). Only phase 3 applies to it.",
    )
    student_width: Count | None = Field(
        default=None,
        description="Channels of the new decoder; by default half of the original's widest (efficientvit: a third, "
        "lean: four thirds).",
    )
    student_start: StudentStart | None = Field(
        default=None,
        description="Initial weights of the new decoder: random, or (by default) least-squares, which also fits its "
        "last layer to the original's frames.",
    )
    phases: Annotated[tuple[PhaseRecipe, ...], Field(min_length=1)] = Field(
        default=(PhaseRecipe(phase=1), PhaseRecipe(phase=2), PhaseRecipe(phase=3)), description="The phases, in order."
    )
    phase: Annotated[PhaseChoice, BeforeValidator(int_as_text)] = Field(
        default="all",
        description="Train only this phase; all trains those that fit the decoder (2 needs an unpruned one).",
    )
    num_steps: Count | None = Field(
        default=None, description="Optimizer steps of every phase, instead of the phases' own."
    )
    learning_rate: Positive | None = Field(
        default=None,
        description="Learning rate of every phase, instead of the phases' own; for a new decoder "
        f"{NEW_STUDENT_LEARNING_RATE:g}, unless the recipe lists phases.",
    )
    optimizer: Literal["soap", "adamw"] = Field(
        default="soap",
        description="soap: Adam in the eigenbasis of the gradients, gentle with weights solved by least squares and "
        "faster per step of training. adamw: the paper's.",
    )
    weight_decay: NonNegative = Field(default=1e-4, description="Weight decay.")
    gradient_clip_norm: Positive = Field(default=1.0, description="Gradients with a larger norm are scaled down to it.")
    max_relative_step: OptionalPositive = Field(
        default=0.01,
        description="With adamw: largest step of a weight tensor as a fraction of its root mean square; lowers the "
        "learning rate only of tensors with tiny weights. 0 sets no limit, as in the paper.",
    )
    learning_rate_schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="After the warm-up: fall to a twentieth along half a cosine, or stay constant."
    )
    num_warmup_steps: WholeNumber | None = Field(
        default=None,
        description="Steps over which the learning rate of a phase rises; by default a fifth of them, at most 200. "
        "Runs of under 20 steps end before the peak: five steps reach a sixteenth of it.",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(
        default=None, description="End each phase with the moving average of its weights; 0.999 for long runs."
    )
    gradient_accumulation: Count = Field(
        default=1, description="Batches per step, one after another: more clips per step in the same memory."
    )
    checkpoint_activations: Switch = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    compile: Switch = Field(default=False, description="Compile both decoders with torch.compile.")
    num_clips: Count = Field(default=64, description="Clips to cut from the data and train on; encoded once.")
    batch_size: Count = Field(default=2, description="Clips per step.")
    num_frames: Count = Field(default=9, description="Frames per training clip, rounded down to what the VAE takes.")
    crop_size: OptionalCount = Field(
        default=96,
        description="Side in pixels of the square cut from each clip, rounded to whole latents; 0 takes everything.",
    )
    buckets: Buckets = Field(
        default=(),
        description="Instead of num_frames and crop_size: clip sizes to train on, frames x height x width; "
        "all clips of a step have the same one. Repeatable.",
    )
    num_workers: WholeNumber | None = Field(
        default=None,
        description="Processes that decode videos while this one encodes; 0 decodes in this one. Default: one fewer "
        "than there are cores, at most 4, and none for few clips.",
    )
    cache_latents: Name | None = Field(
        default=None,
        description="Folder to keep encoded clips in: written once, reused by later runs on the same data.",
    )
    cache_dtype: CacheDType = Field(
        default="float32",
        description="Number format of that folder; float16 takes half the space and rounds latents to 11 bits.",
    )
    loss_weights: LossWeightSettings = Field(default=LossWeightSettings(), description="Weight of every loss term.")
    adversarial_start: WholeNumber = Field(
        default=0, description="The step of a phase at which the adversarial term starts, if it has a weight."
    )
    validation_data: Names = Field(
        default=(),
        description="Videos, folders or latent files to track PSNR to the original's output and sharpness on: at most "
        "8 clips of num_frames whole frames (of at most max_side, or else 512, pixels). Never trained on, even if data "
        "names them too; repeatable.",
    )
    validate_every_steps: Count = Field(default=100, description="Steps between two validations.")
    checkpoint_every_steps: Count = Field(default=50, description="Steps between two checkpoints.")
    checkpoint_every_minutes: OptionalPositive = Field(
        default=10.0, description="Minutes between two checkpoints, if that comes sooner; 0 counts steps only."
    )
    sample_every_minutes: OptionalPositive = Field(
        default=10.0, description="Minutes between two strips of a sample clip in NAME.samples/; 0 draws none."
    )
    tensorboard: Name | None = Field(default=None, description="Folder to log to for TensorBoard.")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto continues from the checkpoint of an interrupted run of the same recipe; never starts over, "
        "and the old checkpoint stays until the first new one.",
    )
    output: Name = Field(default=FLASH_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _chosen_phase_exists(self) -> DistillRecipe:
        if not self.schedule():
            listed = ", ".join(str(phase.phase) for phase in self.phases)
            raise ValueError(f"`phase` is {self.phase}, but `phases` lists only {listed}")
        return self

    @model_validator(mode="after")
    def _student_is_named(self) -> DistillRecipe:
        if self.student is None and (given := self.given("student_width", "student_start")):
            raise ValueError(f"{' and '.join(given)}: only for a new decoder; give --student too")
        return self

    def start_of_student(self) -> StudentStart:
        """How the weights of a new decoder are initialised."""
        return self.student_start or "least-squares"

    def schedule(self) -> tuple[PhaseRecipe, ...]:
        """The phases to train, with `phase`, `num_steps` and `learning_rate` applied."""
        overrides = {"num_steps": self.num_steps, "learning_rate": self.learning_rate}
        if self.student is not None and self.learning_rate is None and "phases" not in self.model_fields_set:
            overrides["learning_rate"] = NEW_STUDENT_LEARNING_RATE
        given = {name: value for name, value in overrides.items() if value is not None}
        return tuple(phase.model_copy(update=given) for phase in self.phases if self.phase in ("all", str(phase.phase)))

    def warmup_steps(self, phase: PhaseRecipe) -> int:
        """Steps over which the learning rate of a phase rises.

        The first steps of Adam and its kin move every weight by the learning rate, however small the gradient,
        and a short run ends before it has made up for them. So the rise takes at least 20 steps, and in runs of
        under 20 steps the rate that is reached falls with the square of their number.
        """
        if self.num_warmup_steps is not None:
            return self.num_warmup_steps
        steps = phase.num_steps
        slowest = _FEWEST_WARMUP_STEPS**2 // steps if steps < _FEWEST_WARMUP_STEPS else _FEWEST_WARMUP_STEPS
        return max(slowest, min(200, -(-steps // 5)))
