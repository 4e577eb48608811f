"""Recipe files: every mistake is named with its line, flags win over recipe over defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.recipe import (
    AnalyzeRecipe,
    DistillRecipe,
    EvalRecipe,
    PruneRecipe,
    Recipe,
    find_recipe,
    load_recipe,
    resolve,
    shipped_recipes,
)

Load = Callable[[str], Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str) -> Recipe:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return load_recipe(path)

    return load_text


def mistakes(load: Load, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_single_section(load: Load) -> None:
    recipe = load("description: half\nprune: {keep_ratio: 0.5}\n")
    assert recipe.description == "half"
    assert resolve(PruneRecipe, recipe).keep_ratio == 0.5


def test_an_empty_section_is_all_defaults(load: Load) -> None:
    assert resolve(PruneRecipe, load("prune:\n")) == PruneRecipe()


def test_a_chain(load: Load) -> None:
    recipe = load("steps:\n  - prune: {rule: random}\n  - distill: {num_steps: 3}\n")
    assert resolve(PruneRecipe, recipe).rule == "random"
    assert resolve(DistillRecipe, recipe).num_steps == 3


def test_scientific_numbers_are_numbers(load: Load) -> None:
    assert resolve(DistillRecipe, load("distill: {learning_rate: 3e-4}")).learning_rate == 3e-4


def test_merge_keys_and_anchors(load: Load) -> None:
    text = "steps:\n  - analyze: &a {num_frames: 9, seed: 1}\n  - prune: {<<: *a, seed: 2}\n"
    recipe = resolve(PruneRecipe, load(text))
    assert (recipe.num_frames, recipe.seed) == (9, 2)


def test_all_mistakes_at_once_with_lines(load: Load) -> None:
    text = """\
steps:
  - prune:
      keep_ratoi: 0.3
      keep_ratio: 1.5
      seed: yes
      round_to: 2
      round_to: 3
  - distil: {}
  - distill: {loss_weights: {l3: 2}, phases: [{phase: 1, num_step: 3}]}
"""
    assert mistakes(load, text) == [
        "line 3: steps[0].prune.keep_ratoi = 0.3: unknown key; did you mean keep_ratio?",
        "line 4: steps[0].prune.keep_ratio = 1.5: must be less than or equal to 1",
        "line 5: steps[0].prune.seed = True: must be a valid integer",
        "line 7: round_to: this key is given twice",
        "line 8: steps[1].distil = {}: unknown command; did you mean distill?",
        "line 9: steps[2].distill.loss_weights.l3 = 2: unknown key "
        "(known: l1, mse, lpips, feature, ssim, l_ce, sharpness, energy, temporal, wavelet, adversarial)",
        "line 9: steps[2].distill.phases[0].num_step = 3: unknown key; did you mean num_steps?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a recipe is a mapping"),
        ("- prune: {}\n", "a recipe is a mapping"),
        ("prune: [1\n", "line 2"),
        ("prune: {}\n---\nprune: {}\n", "not valid YAML"),
        ("prune: &x {a: *x}\n", "contains itself"),
        ("? [a]\n: 1\n", "plain text"),
        ("prune: !!python/object:os.system {}\n", "not valid YAML"),
        ("description: nothing\n", "expected one of analyze"),
        ("prune: {}\ndistill: {}\n", "`steps:`"),
        ("steps: {}\n", "must be a list"),
        ("steps: [prune]\n", "must have one key"),
        ("prune: 3\n", "must be a mapping"),
        ("prune: {name: 3}\n", "must be a text"),
        ("description: 3\nprune: {}\n", "must be a text"),
        ("stages: []\n", "did you mean steps?"),
        ("steps:\n- distill: {name: a}\n- distill: {name: a}\n", "is taken on line 2"),
        ("steps:\n- distill: {name: a}\n- distill: {}\n", "needs a `name:`"),
    ],
)
def test_what_is_no_recipe_is_refused(load: Load, text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert expected in str(caught.value)
    assert "given.yaml" in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)


def test_flags_win_over_recipe_over_defaults(load: Load) -> None:
    recipe = load("prune: {round_to: 8, seed: 5}")
    resolved = resolve(PruneRecipe, recipe, {"seed": 7})
    assert (resolved.round_to, resolved.seed, resolved.rule) == (8, 7, "greedy-energy")


def test_mappings_are_merged_and_an_empty_one_empties(load: Load) -> None:
    recipe = load("prune: {stage_keep_ratios: {up2: 0.5, up3: 0.5}}")
    merged = resolve(PruneRecipe, recipe, {"stage_keep_ratios": {"up3": 0.25}})
    assert merged.stage_keep_ratios == {"up2": 0.5, "up3": 0.25}
    assert resolve(PruneRecipe, recipe, {"stage_keep_ratios": {}}).stage_keep_ratios == {}


def test_who_asked_for_a_key_is_remembered(load: Load) -> None:
    recipe = load("steps:\n- prune:\n    stage_keep_ratios:\n      up2: 0.5\n      up3: 0.5\n    seed: 1\n")
    alone = resolve(PruneRecipe, recipe)
    assert alone.origin("stage_keep_ratios", "up3") == f"{recipe.source}, line 5: prune.stage_keep_ratios.up3"
    merged = resolve(PruneRecipe, recipe, {"stage_keep_ratios": {"up3": 0.25, "up9": 0.5}})
    assert merged.origin("stage_keep_ratios", "up2") == f"{recipe.source}, line 4: prune.stage_keep_ratios.up2"
    assert merged.origin("stage_keep_ratios", "up3") is None  # a flag's
    assert merged.origin("stage_keep_ratios", "up9") is None
    assert resolve(PruneRecipe, recipe, {"stage_keep_ratios": {}}).origin("stage_keep_ratios", "up3") is None
    assert "origins" not in alone.model_dump_json()


def test_a_stages_ratio_as_a_flag_takes_the_place_of_its_groups_ratios(load: Load) -> None:
    recipe = load("prune: {group_keep_ratios: {up2.stream: 0.5, up3.stream: 0.5}}")
    merged = resolve(PruneRecipe, recipe, {"stage_keep_ratios": {"up3": 0.25}})
    assert merged.ratios(()) == {"up3": 0.25, "up2.stream": 0.5}
    both = resolve(PruneRecipe, recipe, {"stage_keep_ratios": {"up3": 0.25}, "group_keep_ratios": {"up3.stream": 0.75}})
    assert both.ratios(()) == {"up3": 0.25, "up2.stream": 0.5, "up3.stream": 0.75}


def test_mistakes_of_several_fields_name_flags_and_keys(load: Load) -> None:
    recipe = load("prune: {keep_ratio: 0.5}")
    with pytest.raises(RecipeError, match="keep_ratio, --target-speedup: a target chooses the ratios itself"):
        resolve(PruneRecipe, recipe, {"target_speedup": 2.0})


def test_mistakes_in_flags_name_the_flag() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(PruneRecipe, None, {"keep_ratio": 3.0, "round_to": 0}, flags={"keep_ratio": "--ratio"})
    message = str(caught.value)
    assert "--ratio = 3.0: must be less than or equal to 1" in message
    assert "--round-to = 0: must be greater than 0" in message


def test_steps_are_chosen_by_name(load: Load) -> None:
    recipe = load("steps:\n- distill: {name: one, seed: 1}\n- distill: {name: two, seed: 2}\n- analyze: {}\n")
    assert resolve(DistillRecipe, recipe, step="two").seed == 2
    with pytest.raises(RecipeError, match=r"choose one by --step \(one, two\)"):
        resolve(DistillRecipe, recipe)
    with pytest.raises(RecipeError, match=r"no distill section of that name \(one, two\)"):
        resolve(DistillRecipe, recipe, step="three")
    with pytest.raises(RecipeError, match=r"no section for eval; it has: distill, analyze"):
        resolve(EvalRecipe, recipe)
    with pytest.raises(RecipeError, match="give --recipe too"):
        resolve(AnalyzeRecipe, None, step="one")


def test_recipes_are_found_by_path_and_by_bare_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prune: {}")
    assert find_recipe(str(path)) == path
    assert find_recipe("demo") == shipped_recipes()["demo"]
    with pytest.raises(RecipeError, match="shipped: demo"):
        find_recipe("demon")
