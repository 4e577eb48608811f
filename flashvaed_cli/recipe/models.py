"""One pydantic model per command: every setting with its type, default and help text.

The descriptions are also the help texts of the flags (`flashvaed_cli/cli/options.py` reads them here),
so a setting is named, explained and defaulted in one place only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flashvaed_cli.recipe.fields import (
    ANALYSIS_FILE,
    BUILTIN_VAE,
    CONVERTED_FILE,
    DEFAULT_KEEP_RATIO,
    FLASH_FILE,
    PRUNED_FILE,
    Buckets,
    CacheDType,
    Count,
    Counts,
    Device,
    DType,
    ExportTarget,
    KeepRatio,
    LatentScale,
    Memory,
    Name,
    Names,
    NonNegative,
    OperatorProfile,
    OptionalCount,
    OptionalPositive,
    PhaseChoice,
    Positive,
    ReconstructMode,
    SelectionRule,
    Sizes,
    StageOperator,
    Switch,
    WholeNumber,
    int_as_text,
    one_as_tuple,
)
from flashvaed_cli.recipe.quantities import NAMED_SIZES


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CommandRecipe(_Frozen):
    """What every command has.

    `command` is the name on the command line and in the YAML. `default_inputs` are the places where a command
    looks, in this order, when no input is given; the last one always exists.
    """

    command: ClassVar[str]
    default_inputs: ClassVar[tuple[str, ...]]

    family: Name | None = Field(
        default=None,
        description="Family of the input, where its names leave that open (wan2.1 and qwen-image have the same).",
    )

    def given(self, *fields: str) -> list[str]:
        """Those of `fields` that are not at their defaults, as flags: to say that they play no role."""
        values = {name: getattr(self, name) for name in fields}
        return [
            ("--no-" if value is False else "--") + name.replace("_", "-")
            for name, value in values.items()
            if value != type(self).model_fields[name].default
        ]

    seed: WholeNumber = Field(default=0, le=2**31 - 1, description="Seed of everything random.")
    device: Device = Field(default="auto", description="Where to compute; auto takes CUDA, then MPS, then the CPU.")
    dtype: DType = Field(default="float32", description="Number format of weights and activations.")


class _ClipFields(CommandRecipe):
    data: Names = Field(
        default=(),
        description="Videos or latent files, folders or patterns of them, lists (.txt, one path per line); repeatable. "
        "Without it, the clip that ships with the program.",
    )
    latent_scale: LatentScale = Field(
        default="normalized",
        description="Scale of latent files: normalized as diffusion models use them, or raw (x * std + mean).",
    )
    max_side: OptionalCount = Field(
        default=None, description="Shrink clips so that the longer side has at most so many pixels."
    )


class CalibratedRecipe(_ClipFields):
    """What commands have that collect statistics on clips."""

    num_calibration_clips: Count = Field(default=8, description="Clips to collect statistics on.")
    num_frames: Count = Field(default=17, description="Frames per calibration clip, rounded down to 1 + 4 n.")
    crop_size: OptionalCount = Field(
        default=128, description="Side in pixels of the square cut from each clip; 0 takes all."
    )


class ReconstructingRecipe(CalibratedRecipe):
    """What commands have that change layers and solve their weights anew."""

    original: Name | None = Field(
        default=None, description="The original VAE, where it is not the one that the input remembers."
    )
    reconstruct: ReconstructMode = Field(
        default="full",
        description="full solves whole kernels by least squares, channel only the map from the channels that are left "
        "to those that a layer read before, none keeps cut weights.",
    )
    dampening_frac: Positive = Field(default=1e-4, description="Ridge term, as a fraction of the gram's mean diagonal.")


class _RatioFields(CommandRecipe):
    keep_ratio: KeepRatio | None = Field(
        default=None,
        description=f"Fraction of channels kept in the family's shallow stages; {DEFAULT_KEEP_RATIO} if none is given.",
    )
    stage_keep_ratios: dict[Name, KeepRatio] = Field(
        default={}, description="Fraction of channels kept by stage name; without keep_ratio, other stages stay whole."
    )
    group_keep_ratios: dict[Name, KeepRatio] = Field(
        default={},
        description="Fraction of channels kept by channel group (up3.stream, up3.0.inner), in place of its stage's.",
    )
    rule: SelectionRule = Field(
        default="greedy-energy",
        description="How the kept channels are chosen: greedy-r2 explains most of the variance of all, greedy-energy "
        "most of their energy (means count too), next-layer most of what the next layers compute; pivoted-qr takes "
        "the largest residual variance, chip the largest drop of the nuclear norm, l1 the largest weights, variance "
        "the largest variance, random any.",
    )

    @model_validator(mode="after")
    def _ratios_name_what_they_should(self) -> _RatioFields:
        # A group's name is its stage's, a dot and more.
        groups = [name for name in self.stage_keep_ratios if "." in name]
        stages = [name for name in self.group_keep_ratios if "." not in name]
        if groups:
            raise ValueError(
                f"`stage_keep_ratios`: {', '.join(groups)} is a channel group: give it in `group_keep_ratios`"
            )
        if stages:
            raise ValueError(f"`group_keep_ratios`: {', '.join(stages)} is a stage: give it in `stage_keep_ratios`")
        return self

    def ratios(self, shallow_stages: Sequence[str]) -> dict[str, float]:
        """Fraction kept by the name of a stage or a channel group; what is not in it stays whole.

        Args:
            shallow_stages: the family's stages that `keep_ratio` speaks of.
        """
        keep_ratio = self.keep_ratio
        if keep_ratio is None and not self.stage_keep_ratios and not self.group_keep_ratios:
            keep_ratio = DEFAULT_KEEP_RATIO
        common = {} if keep_ratio is None else dict.fromkeys(shallow_stages, keep_ratio)
        return {**common, **self.stage_keep_ratios, **self.group_keep_ratios}


class AnalyzeRecipe(CalibratedRecipe):
    """Settings of `flashvaed analyze`."""

    command: ClassVar[str] = "analyze"
    default_inputs: ClassVar[tuple[str, ...]] = (BUILTIN_VAE,)

    input: Name | None = Field(
        default=None, description="VAE to analyze: a file, folder, hf:// address or builtin:NAME."
    )
    latency_frames: Count = Field(default=9, description="Frames of the clip whose decoding is timed.")
    latency_side: Count = Field(
        default=128, description="Height and width in pixels of the clip whose decoding is timed."
    )
    num_latency_rounds: Count = Field(default=3, description="Timed rounds, after one to warm up; the median counts.")
    width_latency_s: OptionalCount = Field(
        default=30,
        description="About how many seconds to spend on the latency of narrower widths, which prune --target-speedup "
        "needs; slow decoders take one round, however long; 0 leaves it out.",
    )
    plots: Switch = Field(default=False, description="Also draw R2 curves, spectra and latency shares as PNG files.")
    output: Name = Field(default=ANALYSIS_FILE, description="Analysis artifact to write.")


class PruneRecipe(ReconstructingRecipe, _RatioFields):
    """Settings of `flashvaed prune`."""

    command: ClassVar[str] = "prune"
    default_inputs: ClassVar[tuple[str, ...]] = (BUILTIN_VAE,)

    input: Name | None = Field(
        default=None, description="Decoder to prune: a file, folder, hf:// address or builtin:NAME."
    )
    analysis: Name | None = Field(
        default=None,
        description=f"Analysis of that decoder. Without it, {ANALYSIS_FILE} if that fits, else made on the fly.",
    )
    round_to: Count = Field(default=1, description="Round kept channel counts up to a multiple of this.")
    target_speedup: Annotated[float, Field(gt=1, strict=True)] | None = Field(
        default=None,
        description="In place of ratios: prune the family's shallow stages until decoding is predicted to be so many "
        "times as fast as that of the input, on this device, by the latency model of the analysis.",
    )
    target_gflops: Positive | None = Field(
        default=None,
        description="In place of ratios: prune the family's shallow stages until decoding the timed clip takes so many "
        "GFLOP.",
    )
    latency_frames: Count | None = Field(
        default=None, description="Frames of the clip that a target speaks of; those of the analysis, or else 9."
    )
    latency_side: Count | None = Field(
        default=None, description="Height and width of the clip that a target speaks of; the analysis', or else 128."
    )
    output: Name = Field(default=PRUNED_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _one_way_to_choose_widths(self) -> PruneRecipe:
        given = {
            "keep_ratio": self.keep_ratio is not None,
            "stage_keep_ratios": bool(self.stage_keep_ratios),
            "group_keep_ratios": bool(self.group_keep_ratios),
            "target_speedup": self.target_speedup is not None,
            "target_gflops": self.target_gflops is not None,
        }
        chosen = [name for name, is_given in given.items() if is_given]
        if len(chosen) > 1 and chosen[-1].startswith("target"):
            listed = ", ".join(f"`{name}`" for name in chosen)
            raise ValueError(f"{listed}: a target chooses the ratios itself; give one target, or ratios")
        return self

    @property
    def has_target(self) -> bool:
        """Whether widths come from a budget instead of ratios."""
        return self.target_speedup is not None or self.target_gflops is not None


class ConvertOpsRecipe(ReconstructingRecipe):
    """Settings of `flashvaed convert-ops`."""

    command: ClassVar[str] = "convert-ops"
    default_inputs: ClassVar[tuple[str, ...]] = (PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to convert: a file, folder, hf:// address or builtin:NAME."
    )
    profile: OperatorProfile = Field(
        default="paper",
        description="paper: the paper's cheaper operator for each stage, weights solved anew. exact: for each layer "
        "the fastest operator that gives the same frames, without data. image: the decoder of single images (one "
        "latent frame) that gives the same pixels, without data; its layers work on frames alone.",
    )
    operators: dict[Name, StageOperator] = Field(
        default={}, description="Operator by stage name, in place of the profile's."
    )
    time_rank: KeepRatio | None = Field(
        default=None,
        description="Factorise the kernels that double the frames: the fraction of their full rank that is kept. "
        "Without it they stay whole, as in the paper.",
    )
    num_separable_iterations: Count = Field(
        default=3, description="Alternations between the depthwise and the pointwise solve of one layer."
    )
    output: Name = Field(default=CONVERTED_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _only_paper_takes_operators(self) -> ConvertOpsRecipe:
        given = {"operators": bool(self.operators), "time_rank": self.time_rank is not None}
        if self.profile != "paper" and (names := [f"`{name}`" for name, is_given in given.items() if is_given]):
            listed = " and ".join(names)
            raise ValueError(f"`profile` is {self.profile}, which gives every layer its operator: leave {listed} out")
        return self


class LossWeights(_Frozen):
    """Weight of every term of the distillation loss; 0 switches a term off.

    Reference: arXiv 2602.19161 for L1, LPIPS, feature, SSIM and L_ce; the others are ours.
    """

    l1: NonNegative = Field(default=10.0, description="Mean absolute difference of pixels.")
    mse: NonNegative = Field(default=0.0, description="Mean squared difference of pixels; of the order of 1e-3.")
    lpips: NonNegative = Field(default=2.0, description="Perceptual distance; needs the backbone's weights.")
    feature: NonNegative = Field(default=1.0, description="Mean absolute difference of stage features.")
    ssim: NonNegative = Field(default=5.0, description="1 - SSIM.")
    l_ce: NonNegative = Field(default=1.0, description="1 - R2 of all channels given the kept ones; phase 2 only.")
    sharpness: NonNegative = Field(default=0.0, description="Difference of Laplacian pyramids.")
    energy: NonNegative = Field(
        default=0.0,
        description="Logarithm of the ratio of Laplacian energies, against softness; 0.002 beside mse 1, say.",
    )
    temporal: NonNegative = Field(default=0.0, description="Difference of frame-to-frame changes.")


class PhaseRecipe(_Frozen):
    """One phase of distillation."""

    phase: Literal[1, 2, 3] = Field(
        description="1: converted deep stages. 2: the whole, before pruning, with L_ce. 3: the whole, after pruning."
    )
    num_steps: Count = Field(default=100, description="Optimizer steps.")
    learning_rate: Positive = Field(default=3e-4, description="Learning rate of the optimizer.")


class DistillRecipe(_ClipFields, _RatioFields):
    """Settings of `flashvaed distill`; the ratios and the rule name the channels that phase 2 prepares for pruning."""

    command: ClassVar[str] = "distill"
    default_inputs: ClassVar[tuple[str, ...]] = (CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to train: a file, folder, hf:// address or builtin:NAME."
    )
    original: Name | None = Field(
        default=None, description="The original VAE, where it is not the one that the input remembers."
    )
    phases: Annotated[tuple[PhaseRecipe, ...], Field(min_length=1)] = Field(
        default=(PhaseRecipe(phase=1), PhaseRecipe(phase=2), PhaseRecipe(phase=3)), description="The phases, in order."
    )
    phase: Annotated[PhaseChoice, BeforeValidator(int_as_text)] = Field(
        default="all",
        description="Train this phase only; all takes those that fit the decoder (2 needs an unpruned one).",
    )
    num_steps: Count | None = Field(
        default=None, description="Optimizer steps of every phase, in place of the phases' own."
    )
    learning_rate: Positive | None = Field(
        default=None, description="Learning rate of every phase, in place of the phases' own."
    )
    optimizer: Literal["soap", "adamw"] = Field(
        default="soap",
        description="soap: Adam in the eigenbasis of the gradients, gentle with weights solved by least squares and "
        "faster per step of training. adamw: the paper's.",
    )
    weight_decay: NonNegative = Field(default=1e-4, description="Weight decay.")
    gradient_clip_norm: Positive = Field(default=1.0, description="Longest gradient that is let through unscaled.")
    max_relative_step: OptionalPositive = Field(
        default=0.01,
        description="With adamw: longest step of a weight tensor as a fraction of its root mean square; it lowers the "
        "learning rate of tensors with tiny weights only. 0 sets no limit, as in the paper.",
    )
    learning_rate_schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="After the warm-up: fall to a twentieth in half a cosine, or stay."
    )
    num_warmup_steps: WholeNumber | None = Field(
        default=None,
        description="Steps over which the learning rate of a phase rises; by default a fifth of them, at most 200.",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(
        default=None, description="End each phase with the moving average of its weights; 0.999 for long runs."
    )
    gradient_accumulation: Count = Field(
        default=1, description="Batches per step, one after the other: more clips per step in the same memory."
    )
    checkpoint_activations: Switch = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    compile: Switch = Field(default=False, description="Compile both decoders with torch.compile.")
    num_clips: Count = Field(default=64, description="Clips to cut from the data and train on; encoded once.")
    batch_size: Count = Field(default=2, description="Clips per step.")
    num_frames: Count = Field(default=9, description="Frames per training clip.")
    crop_size: OptionalCount = Field(
        default=96, description="Side in pixels of the square cut from each clip; 0 takes all."
    )
    buckets: Buckets = Field(
        default=(),
        description="In place of num_frames and crop_size: sizes of clip to train on, frames x height x width; "
        "all clips of a step are of one. Repeatable.",
    )
    num_workers: WholeNumber | None = Field(
        default=None,
        description="Processes that decode videos while this one encodes; 0 decodes in this one. By default at most 4, "
        "one core less than there are, and none for few clips.",
    )
    cache_latents: Name | None = Field(
        default=None,
        description="Folder to keep encoded clips in: written once, taken up by later runs on the same data.",
    )
    cache_dtype: CacheDType = Field(
        default="float32",
        description="Number format of that folder; float16 takes half the room and rounds latents to 11 bits.",
    )
    loss_weights: LossWeights = Field(default=LossWeights(), description="Weight of every loss term.")
    allow_download: Switch = Field(
        default=False, description="Fetch the backbone of the LPIPS term if its weights are absent."
    )
    validation_data: Names = Field(
        default=(),
        description="Videos, folders or latent files that are not trained on, even if data names them too: at most 8 "
        "whole clips of num_frames frames, to follow PSNR to the original's output and sharpness; repeatable.",
    )
    validate_every_steps: Count = Field(default=100, description="Steps between two looks at the validation data.")
    checkpoint_every_steps: Count = Field(default=50, description="Steps between two checkpoints.")
    checkpoint_every_minutes: OptionalPositive = Field(
        default=10.0, description="Minutes between two checkpoints, where that is sooner; 0 counts steps only."
    )
    sample_every_minutes: OptionalPositive = Field(
        default=10.0, description="Minutes between two strips of a sample clip in NAME.samples/; 0 draws none."
    )
    tensorboard: Name | None = Field(default=None, description="Folder to log to for TensorBoard.")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto goes on from the checkpoint of an interrupted run of the same recipe."
    )
    output: Name = Field(default=FLASH_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _chosen_phase_exists(self) -> DistillRecipe:
        if not self.schedule():
            listed = ", ".join(str(phase.phase) for phase in self.phases)
            raise ValueError(f"`phase` is {self.phase}, but `phases` lists only {listed}")
        return self

    def schedule(self) -> tuple[PhaseRecipe, ...]:
        """The phases to train, with `phase`, `num_steps` and `learning_rate` applied."""
        overrides = {"num_steps": self.num_steps, "learning_rate": self.learning_rate}
        given = {name: value for name, value in overrides.items() if value is not None}
        return tuple(phase.model_copy(update=given) for phase in self.phases if self.phase in ("all", str(phase.phase)))

    def warmup_steps(self, phase: PhaseRecipe) -> int:
        """Steps over which the learning rate of a phase rises.

        AdamW's first steps are as long as the learning rate in every weight, however small the gradient.
        """
        return min(200, -(-phase.num_steps // 5)) if self.num_warmup_steps is None else self.num_warmup_steps


_SPEED_ONLY = ("sizes", "frames", "compile", "autotune")


class EvalRecipe(_ClipFields):
    """Settings of `flashvaed eval`."""

    command: ClassVar[str] = "eval"
    default_inputs: ClassVar[tuple[str, ...]] = (FLASH_FILE, CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to judge: a file, folder, hf:// address or builtin:NAME."
    )
    original: Name | None = Field(
        default=None, description="The original VAE, where it is not the one that the input remembers."
    )
    compare: Names = Field(
        default=(), description="Further decoders of the same original, for more columns in the tables; repeatable."
    )
    num_clips: OptionalCount = Field(default=None, description="Judge at most so many clips.")
    num_frames: OptionalCount = Field(default=None, description="Judge at most so many frames of each clip.")
    chunk: Count | None = Field(
        default=None, description="Latent frames decoded at a time; bounds memory, changes no frame."
    )
    num_speed_rounds: Count = Field(
        default=5, description="Timed rounds of all decoders in alternation, after a warm-up."
    )
    speed: Switch = Field(
        default=False,
        description="Only time the decoders, on random latents, against the original eager and tuned; no clips.",
    )
    sizes: Sizes = Field(
        default=("256x256",),
        description=f"With --speed: frame sizes, by commas; {', '.join(NAMED_SIZES)} or WIDTHxHEIGHT.",
    )
    frames: Counts = Field(
        default=(9,), description="With --speed: frames per clip, by commas; rounded up to 1 + 4 n, whole latents."
    )
    compile: Switch = Field(default=False, description="With --speed: compile the tuned decoders with torch.compile.")
    tile: Count | None = Field(
        default=None, description="Side in latents of the tiles that are decoded by themselves; changes no frame."
    )
    max_memory: Memory | None = Field(
        default=None, description="Choose chunk and tile so that every decoder stays below this, such as 4GB."
    )
    autotune: Switch = Field(
        default=False,
        description="With --speed: try layouts, operators, chunks (and --compile) first; remembered per machine.",
    )
    video: Switch = Field(default=True, description="Write a side-by-side MP4 (a PNG for single frames).")
    lpips: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto reports LPIPS when the backbone's weights are there; on fails without them."
    )
    allow_download: Switch = Field(default=False, description="Fetch the LPIPS backbone's weights if they are absent.")
    output: Name = Field(
        default="report", description="Folder to write report.json, report.md and pictures (speed.json, speed.md) to."
    )

    @model_validator(mode="after")
    def _speed_settings_need_speed(self) -> EvalRecipe:
        given = [name for name in _SPEED_ONLY if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.speed:
            listed = ", ".join(f"`{name}`" for name in given)
            raise ValueError(f"{listed}: only with --speed, which times decoders and judges no clip")
        return self


class ExportRecipe(CommandRecipe):
    """Settings of `flashvaed export`."""

    command: ClassVar[str] = "export"
    default_inputs: ClassVar[tuple[str, ...]] = (FLASH_FILE, CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to export: a file, folder, hf:// address or builtin:NAME."
    )
    targets: Annotated[tuple[ExportTarget, ...], BeforeValidator(one_as_tuple), Field(min_length=1)] = Field(
        default=("safetensors", "onnx"), description="Formats to write; repeatable."
    )
    opset: Annotated[int, Field(ge=18, strict=True)] = Field(default=18, description="ONNX operator set.")
    output: Name = Field(default="export", description="Folder to write to.")


COMMAND_RECIPES: dict[str, type[CommandRecipe]] = {
    model.command: model
    for model in (AnalyzeRecipe, PruneRecipe, ConvertOpsRecipe, DistillRecipe, EvalRecipe, ExportRecipe)
}
