"""Defaults chain, values are checked, derived settings follow."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flashvaed_cli.recipe import (
    COMMAND_RECIPES,
    AnalyzeRecipe,
    ConvertOpsRecipe,
    DistillRecipe,
    EvalRecipe,
    ExportRecipe,
    LossWeightSettings,
    PhaseRecipe,
    PruneRecipe,
)


def test_defaults_chain_in_one_folder() -> None:
    assert ConvertOpsRecipe.default_inputs[0] == PruneRecipe().output
    assert DistillRecipe.default_inputs[0] == ConvertOpsRecipe().output
    assert EvalRecipe.default_inputs[0] == ExportRecipe.default_inputs[0] == DistillRecipe().output


@pytest.mark.parametrize("model", COMMAND_RECIPES.values(), ids=list(COMMAND_RECIPES))
def test_every_command_runs_in_an_empty_folder(model: type) -> None:
    assert model.default_inputs[-1] == "builtin:tiny-wan"
    assert model().input is None


@pytest.mark.parametrize("model", COMMAND_RECIPES.values(), ids=list(COMMAND_RECIPES))
def test_every_field_says_what_it_is(model: type) -> None:
    undocumented = [name for name, field in model.model_fields.items() if not field.description]
    assert undocumented == []


@pytest.mark.parametrize("model", COMMAND_RECIPES.values(), ids=list(COMMAND_RECIPES))
def test_json_brings_the_same_settings_back(model: type) -> None:
    settings = model()
    assert model.model_validate(json.loads(settings.model_dump_json())) == settings


@given(ratio=st.floats(allow_nan=True, allow_infinity=True))
def test_keep_ratio_lies_in_zero_to_one(ratio: float) -> None:
    if 0 < ratio <= 1:
        assert PruneRecipe(keep_ratio=ratio).keep_ratio == ratio
    else:
        with pytest.raises(ValidationError):
            PruneRecipe(keep_ratio=ratio)


@pytest.mark.parametrize("value", [True, "8", 8.5, 0, -1])
def test_counts_are_not_guessed(value: object) -> None:
    with pytest.raises(ValidationError):
        AnalyzeRecipe.model_validate({"num_frames": value})


def test_zero_switches_cropping_off() -> None:
    assert AnalyzeRecipe.model_validate({"crop_size": 0}).crop_size is None


def test_one_path_is_a_list_of_one() -> None:
    assert AnalyzeRecipe.model_validate({"data": "clip.mp4"}).data == ("clip.mp4",)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PruneRecipe().keep_ratio = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"up2": 0.25, "up3": 0.25}),
        ({"keep_ratio": 0.5}, {"up2": 0.5, "up3": 0.5}),
        ({"stage_keep_ratios": {"up3": 0.125}}, {"up3": 0.125}),
        ({"keep_ratio": 0.5, "stage_keep_ratios": {"up3": 0.125, "up1": 1.0}}, {"up2": 0.5, "up3": 0.125, "up1": 1.0}),
        ({"group_keep_ratios": {"up3.stream": 0.5}}, {"up3.stream": 0.5}),
        (
            {"keep_ratio": 0.5, "group_keep_ratios": {"up3.0.inner": 0.25}},
            {"up2": 0.5, "up3": 0.5, "up3.0.inner": 0.25},
        ),
    ],
)
def test_ratios_by_stage(settings: dict[str, object], expected: dict[str, float]) -> None:
    assert PruneRecipe.model_validate(settings).ratios(("up2", "up3")) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_keep_ratios": {"up3.stream": 0.5}}, r"up3\.stream is a channel group: give it in `group_keep_ratios`"),
        ({"group_keep_ratios": {"up3": 0.5}}, "up3 is a stage: give it in `stage_keep_ratios`"),
    ],
)
def test_stages_and_groups_are_not_mixed_up(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneRecipe.model_validate(settings)


def test_schedule_takes_the_chosen_phase_and_the_common_values() -> None:
    recipe = DistillRecipe(phase="3", num_steps=7)
    assert [(phase.phase, phase.num_steps, phase.learning_rate) for phase in recipe.schedule()] == [(3, 7, 3e-4)]
    assert [phase.phase for phase in DistillRecipe().schedule()] == [1, 2, 3]


def test_a_phase_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ValidationError, match="lists only 1"):
        DistillRecipe.model_validate({"phase": 3, "phases": [{"phase": 1}]})


def test_short_runs_stay_below_the_full_learning_rate() -> None:
    def reached(num_steps: int) -> float:
        return min(1.0, num_steps / DistillRecipe().warmup_steps(PhaseRecipe(phase=3, num_steps=num_steps)))

    assert [reached(num_steps) for num_steps in (5, 10, 20, 40)] == [1 / 16, 1 / 4, 1, 1]
    assert 0 < reached(1) < reached(2) < reached(19) < 1
    plain = [-(-num_steps // 5) for num_steps in range(100, 1001)]  # a fifth, rounded up
    assert [DistillRecipe().warmup_steps(PhaseRecipe(phase=3, num_steps=n)) for n in range(100, 1001)] == plain
    assert DistillRecipe().warmup_steps(PhaseRecipe(phase=3, num_steps=20000)) == 200
    assert DistillRecipe(num_warmup_steps=0).warmup_steps(PhaseRecipe(phase=3, num_steps=5)) == 0


def test_loss_weights_are_the_papers() -> None:
    weights = LossWeightSettings()
    assert (weights.l1, weights.lpips, weights.feature, weights.ssim, weights.l_ce) == (10, 2, 1, 5, 1)
    assert (weights.sharpness, weights.temporal) == (0, 0)


def test_recipe_imports_no_torch() -> None:
    code = "import sys, flashvaed_cli.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_student_learns_faster_unless_told() -> None:
    new = DistillRecipe(student="tae")
    assert {phase.learning_rate for phase in new.schedule()} == {3e-3} and new.start_of_student() == "least-squares"
    assert {phase.learning_rate for phase in DistillRecipe().schedule()} == {3e-4}
    assert {phase.learning_rate for phase in DistillRecipe(student="tae", learning_rate=1e-3).schedule()} == {1e-3}
    listed = DistillRecipe(student="tae", phases=(PhaseRecipe(phase=3, learning_rate=2e-3),))
    assert [phase.learning_rate for phase in listed.schedule()] == [2e-3]


def test_what_a_new_student_is_like_needs_one() -> None:
    for fields in ({"student_width": 8}, {"student_start": "random"}):
        with pytest.raises(ValidationError, match="only for a new decoder; give --student too"):
            DistillRecipe.model_validate(fields)
    with pytest.raises(ValidationError, match="student"):
        DistillRecipe.model_validate({"student": "taesd"})
