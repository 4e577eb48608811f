"""Every shipped recipe parses, and each of its sections resolves to settings that its file chain supports."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvaed_cli.recipe import COMMAND_RECIPES, DistillRecipe, load_recipe, resolve

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_the_folder_is_not_empty() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "fast", "paper", "wan2.1", "wan2.2", "qwen-image"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_resolves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description
    for section in recipe.sections:
        settings = resolve(COMMAND_RECIPES[section.command], recipe, step=section.name)
        for field, value in section.settings.items():
            assert getattr(settings, field) is not None or value == 0, (field, value)  # 0 leaves something out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_file_that_a_section_reads_is_written_before_it(path: Path) -> None:
    written = {"builtin:tiny-wan"}
    recipe = load_recipe(path)
    for section in recipe.sections:
        settings = resolve(COMMAND_RECIPES[section.command], recipe, step=section.name)
        source = getattr(settings, "input", None)
        if source is None:
            source = next(place for place in settings.default_inputs if place in written)
        assert source in written or source.startswith("hf://")
        written.add(getattr(settings, "output"))  # noqa: B009


def test_the_paper_recipe_is_the_papers_order() -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "paper"))
    order = [(section.command, section.name) for section in recipe.sections]
    assert order == [
        ("convert-ops", None),
        ("distill", "phase1"),
        ("distill", "phase2"),
        ("prune", None),
        ("distill", "phase3"),
    ]
    phases = [resolve(DistillRecipe, recipe, step=name).schedule()[0].phase for name in ("phase1", "phase2", "phase3")]
    assert phases == [1, 2, 3]
