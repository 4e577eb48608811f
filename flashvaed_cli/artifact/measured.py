"""What commands measure and leave in an artifact's header under `measured`: one record for each command.

Whoever writes such figures fills in a record, whoever reads them gets one back, so the names of the JSON stand here and
nowhere else. Artifacts of other versions may lack fields or have more; what does not fit a record at all is no record.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError

from flashvaed_cli.artifact.header import ArtifactHeader

RecordT = TypeVar("RecordT", bound="Record")
Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured value; what was not finite is null in a header, and is read back as NaN."""


class Record(BaseModel):
    """Figures by name. Those that were never set are absent from the JSON, as are those of `optional` that are None."""

    model_config = ConfigDict(frozen=True)
    optional: ClassVar[tuple[str, ...]] = ()

    def as_json(self) -> dict[str, Any]:
        """For the header and `--json`."""
        fields = self.model_dump(exclude_unset=True)
        return {name: value for name, value in fields.items() if value is not None or name not in self.optional}

    @classmethod
    def of(cls: type[RecordT], header: ArtifactHeader | None) -> RecordT | None:
        """The record in a header; None if there is none, or it is damaged."""
        try:
            return None if header is None else cls.model_validate(header.measured)
        except ValidationError:
            return None


class Conditions(Record):
    """What makes decoding times comparable: the clip in pixels, and what decoded it how.

    `num_threads` is None off the CPU.
    """

    num_frames: int
    side: int
    device: str
    num_threads: int | None
    dtype: str
    layout: str


class BlockTimes(Record):
    """Decoding time of one block on a grid of widths.

    Attributes:
        block: its address.
        axes: one or two lists of channel groups.
        widths: the coordinates on each axis: a group's width, the geometric mean of two groups' widths.
        latency_ms: one value per grid point, the last axis fastest.
    """

    block: str
    axes: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[float, ...], ...]
    latency_ms: tuple[float, ...]


class WidthTimes(Conditions):
    """The latency model of pruning.

    Attributes:
        stages: whose widths were varied, the family's shallow ones.
        fixed_ms: time of all blocks that their widths do not reach.
        ladders: the widths at which each channel group was measured, widest first.
    """

    stages: tuple[str, ...]
    fixed_ms: float
    blocks: tuple[BlockTimes, ...]
    ladders: dict[str, tuple[int, ...]]


class StageFigures(Record):
    """Cost of one stage; `effective_rank` and `width` are of the stream that it hands on, if it has one."""

    stage: str
    parameters: int
    gflop: float
    latency_ms: dict[str, float]
    activation_mib: float
    width: int | None
    effective_rank: int | None


class GroupFigures(Record):
    """How far the channels of a group depend on one another.

    Attributes:
        order: in which channels are kept.
        r2: of the kept ones after each pick.
        spectrum: shares of the variance, largest component first.
        dead, constant: indices of the channels without variance, without and with a mean.
    """

    group: str
    stage: str
    width: int
    tensors: tuple[str, ...]
    effective_rank: int
    order: tuple[int, ...]
    r2: tuple[Figure, ...]
    spectrum: tuple[Figure, ...]
    dead: tuple[int, ...]
    constant: tuple[int, ...]

    @property
    def is_stream(self) -> bool:
        """Whether its channels are those that the stage's blocks hand on to each other."""
        return self.group.endswith(".stream")


class CalibratedClips(Record):
    """What statistics were collected on: `positions` by tensor, `skipped` clips with the reason."""

    num_clips: int = 0
    skipped: dict[str, str] = {}
    positions: dict[str, PositiveInt]
    latency_frames: int | None = None
    latency_side: int | None = None
    device: str | None = None
    dtype: str | None = None


class AnalysisRecord(Record):
    """`analyze`. `rule`: by which the channels are ordered, as `prune --rule` would."""

    optional = ("width_latency",)

    stages: tuple[StageFigures, ...] = ()
    rule: str | None = None
    groups: tuple[GroupFigures, ...] = ()
    clips: CalibratedClips
    width_latency: WidthTimes | None = None


class SelectedChannels(Record):
    """What was kept of one channel group; `r2` is that of the kept set."""

    group: str
    width: int
    kept: tuple[int, ...]
    r2: Figure
    dead: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()


class LayerFigures(Record):
    """Relative error of a fitted layer on the calibration rows, before and after."""

    address: str
    before: Figure
    after: Figure
    num_rows: int
    num_unknowns: int


class HeldOutFigures(Record):
    """How a decoder did on clips that no weight was fitted to; `which` says how they relate to those of the fit."""

    clips: tuple[str, ...]
    which: str
    num_clips: int
    psnr_db: Figure
    sharpness_ratio: float | None
    gflop_before: float
    gflop_after: float


class PredictedTimes(Record):
    """What the latency model says of a clip."""

    speedup: float
    latency_before_ms: float
    latency_after_ms: float


class MeasuredTimes(PredictedTimes):
    """What was timed, in alternation; the range is over the rounds."""

    speedup_min: float
    speedup_max: float


class BudgetedGroup(Record):
    """The width that a budget leaves a channel group, and the error 1 - R² predicted for it."""

    group: str
    width: int
    num_kept: int
    predicted_error: float


class BudgetRecord(Conditions):
    """`prune --target-speedup` and `--target-gflops`: what was asked for, predicted and reached.

    Attributes:
        predicted: None without a latency model (`--target-gflops`).
        gflop_before, gflop_after: arithmetic of decoding that clip.
        groups: none for the native layout, which has one width for all.
    """

    target_speedup: float | None
    target_gflops: float | None
    predicted: PredictedTimes | None
    measured: MeasuredTimes
    gflop_before: float
    gflop_after: float
    groups: tuple[BudgetedGroup, ...]


class EncoderFigures(Record):
    """An encoder that was narrowed with its decoder: `latent_error` is the share of the latents' variance missed."""

    parameters_before: int
    parameters_after: int
    layer_errors: tuple[LayerFigures, ...]
    latent_error: Figure
    psnr_db_with_original_encoder: Figure
    psnr_db: Figure


class PruneRecord(Record):
    """`prune`."""

    optional = ("encoder", "budget")

    layout: str | None = None
    selection: tuple[SelectedChannels, ...]
    layer_errors: tuple[LayerFigures, ...] = ()
    parameters_before: int
    parameters_after: int
    skipped_clips: dict[str, str] = {}
    encoder: EncoderFigures | None = None
    budget: BudgetRecord | None = None
    held_out: HeldOutFigures | None = None


class ConversionRecord(Record):
    """`convert-ops`. `operators` are by stage, of exact profiles by layer; `time_ranks` by layer."""

    operators: dict[str, str]
    time_ranks: dict[str, int] = {}
    layer_errors: tuple[LayerFigures, ...] = ()
    skipped_clips: dict[str, str] = {}
    held_out: HeldOutFigures | None = None
    max_difference_of_range: float | None = None
    gflop_9x256x256_before: float
    gflop_9x256x256_after: float


class PhaseRecord(Record):
    """One phase of `distill`; `history` has an entry for every step that was logged."""

    phase: int
    num_steps: int
    seconds: float
    data_seconds: float | None = None
    clips_per_s: float | None = None
    resumed_from: int | None = None
    absent_terms: tuple[str, ...] = ()
    history: tuple[Mapping[str, int | float | None], ...]


class SameClips(Record):
    """PSNR to the original on the same training clips before and after."""

    num_clips: int
    psnr_db_before: Figure
    psnr_db_after: Figure


class NewStudent(Record):
    """The shape of a light student, its width, and what its first weights missed (`random`: nothing was fitted)."""

    shape: str
    width: int
    start: dict[str, Figure] | str


class DistillRecord(Record):
    """`distill`. `prepared_channels`: by tensor, those that phase 2 prepared the decoder to keep."""

    optional = ("student",)

    data: dict[str, Any] = {}
    phases: tuple[PhaseRecord, ...]
    num_processes: int = 1
    prepared_channels: dict[str, tuple[int, ...]] = {}
    same_clips: SameClips | None = None
    student: NewStudent | None = None
