"""`prune --target-speedup` and `--target-gflops`: widths from a budget, and how the prediction turned out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch

from flashvaed_cli.artifact.measured import BudgetedGroup, BudgetRecord, MeasuredTimes, PredictedTimes, WidthTimes
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.predict.latency import WidthLatency, rounded_ladder, width_ladder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.metrics.speed import SpeedResult, speed_ratio, synchronizer, time_alternating
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.latency_model import TimedClip, measure_width_times, stored_model, whole_clip, width_latency
from flashvaed_cli.surgery.budget import WidthPlan, gflop_cost, group_curves, plan_gflops, plan_speedup

_NUM_SPEED_ROUNDS = 7
_DEFAULTS = AnalyzeRecipe()


@dataclass(frozen=True)
class Budget:
    """The plan found, and the clip that its times or operations are for."""

    plan: WidthPlan | None  # None: one width for the whole decoder, found by timing
    clip: TimedClip


def plan_budget(
    recipe: PruneRecipe,
    decoder: Decoder,
    statistics: Mapping[str, TensorStatistics],
    stored: WidthTimes | None,
    device: torch.device,
    progress: Progress,
) -> Budget:
    """Choose a width for every channel group of the family's shallow stages by the recipe's target.

    Args:
        stored: the latency model of the analysis, if it has one.
    Raises:
        SpecError: the target is out of reach, or asks for nothing.
    """
    clip = target_clip(recipe, decoder.spec, stored, device, progress)
    stages = get_family(decoder.spec.family).shallow_stages
    curves = group_curves(decoder, statistics, stages, rule=recipe.rule, seed=recipe.seed)
    if recipe.target_gflops is not None:
        groups = [group for group in channel_groups(decoder.spec) if group.stage in stages]
        ladders = {
            group.name: rounded_ladder(width_ladder(group.width), math.lcm(recipe.round_to, group.run))
            for group in groups
        }
        cost = gflop_cost(decoder.spec, clip.grid(decoder.spec))
        return Budget(plan_gflops(curves, cost, ladders, recipe.target_gflops), clip)
    assert recipe.target_speedup is not None
    model = _latency_model(recipe, decoder, stored, clip, progress)
    runs = {group.name: group.run for group in channel_groups(decoder.spec)}
    ladders = {
        name: rounded_ladder(ladder, math.lcm(recipe.round_to, runs[name])) for name, ladder in model.ladders.items()
    }
    return Budget(plan_speedup(curves, model, ladders, recipe.target_speedup), clip)


def target_clip(
    recipe: PruneRecipe,
    spec: DecoderSpec,
    stored: WidthTimes | None,
    device: torch.device,
    progress: Progress,
) -> TimedClip:
    """The clip that a target is for: the recipe's, else that of the analysis, else the default."""
    frames, side = (stored.num_frames, stored.side) if stored else (_DEFAULTS.latency_frames, _DEFAULTS.latency_side)
    num_frames, side = recipe.latency_frames or frames, recipe.latency_side or side
    return whole_clip(TimedClip(num_frames, side, device, recipe.dtype), spec, recipe, progress)


def _latency_model(
    recipe: PruneRecipe, decoder: Decoder, stored: WidthTimes | None, clip: TimedClip, progress: Progress
) -> WidthLatency:
    model, reason = stored_model(stored, clip)
    if model is not None:
        return model
    progress.log(f"{reason}: measuring it now")
    budget_s = float(_DEFAULTS.width_latency_s or 0)
    return width_latency(measure_width_times(decoder, clip, budget_s=budget_s, seed=recipe.seed, progress=progress))


@torch.no_grad()
def judge_budget(
    recipe: PruneRecipe, budget: Budget, decoder: Decoder, student: Decoder, progress: Progress
) -> BudgetRecord:
    """Time decoder and student in alternation, as the product runs them."""
    clip, plan = budget.clip, budget.plan
    times = times_of(decoder, student, clip, recipe.seed, _NUM_SPEED_ROUNDS, progress)
    ratio = speed_ratio(times["before"], times["after"])
    predicted = None
    if recipe.target_speedup is not None and plan is not None:
        predicted = PredictedTimes(speedup=plan.speedup, latency_before_ms=plan.full_cost, latency_after_ms=plan.cost)
    measured = MeasuredTimes(
        speedup=ratio.median,
        speedup_min=ratio.min,
        speedup_max=ratio.max,
        latency_before_ms=1e3 * times["before"].median,
        latency_after_ms=1e3 * times["after"].median,
    )
    full_widths = {} if plan is None else plan.full_widths
    return BudgetRecord(
        **clip.conditions().as_json(),
        target_speedup=recipe.target_speedup,
        target_gflops=recipe.target_gflops,
        predicted=predicted,
        measured=measured,
        gflop_before=total_gflop(decoder.spec, clip.grid(decoder.spec)),
        gflop_after=total_gflop(student.spec, clip.grid(decoder.spec)),
        groups=tuple(
            BudgetedGroup(group=name, width=full, num_kept=plan.widths[name], predicted_error=plan.errors[name])
            for name, full in full_widths.items()
            if plan is not None
        ),
    )


def times_of(
    decoder: Decoder, student: Decoder, clip: TimedClip, seed: int, num_rounds: int, progress: Progress
) -> dict[str, SpeedResult]:
    """Time `before` and `after` in alternation, with the operators and the layout that a runtime would choose."""
    latents = channels_last(clip.latents(decoder.spec, seed))
    before, after = (
        use_channels_last(exact_decoder(deepcopy(one).to(DTYPES[clip.dtype]))) for one in (decoder, student)
    )
    return time_alternating(
        {"before": lambda: before(latents), "after": lambda: after(latents)},
        num_rounds=num_rounds,
        synchronize=synchronizer(clip.device),
        progress=progress,
    )


def budget_table(record: BudgetRecord) -> TableData:
    """Predicted against measured."""
    predicted, measured = record.predicted, record.measured
    rows: list[tuple[str | float | None, ...]] = [
        (label, getattr(predicted, key, None), getattr(measured, key))
        for label, key in (
            ("speed-up", "speedup"),
            ("ms before", "latency_before_ms"),
            ("ms after", "latency_after_ms"),
        )
    ]
    gflop = (record.gflop_before, record.gflop_after)
    rows.append(("GFLOP before / after", " / ".join(f"{value:.4g}" for value in gflop), None))
    asked = f"speed-up {record.target_speedup:g}" if record.target_speedup else f"{record.target_gflops:g} GFLOP"
    title = f"Budget: {asked}, {counted(record.num_frames, 'frame')} of {record.side} x {record.side}"
    columns = (Column("", align="left"), Column("predicted", ".3g"), Column("measured", ".3g"))
    return TableData(title, columns, tuple(rows))
