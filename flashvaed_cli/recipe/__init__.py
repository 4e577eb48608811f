"""Pydantic schemas of the YAML recipes. Imports no torch."""

from flashvaed_cli.recipe.loading import Recipe, Section, find_recipe, load_recipe, resolve, shipped_recipes
from flashvaed_cli.recipe.models import (
    COMMAND_RECIPES,
    AnalyzeRecipe,
    CommandRecipe,
    ConvertOpsRecipe,
    DistillRecipe,
    EvalRecipe,
    ExportRecipe,
    LossWeights,
    PhaseRecipe,
    PruneRecipe,
)

__all__ = [
    "COMMAND_RECIPES",
    "AnalyzeRecipe",
    "CommandRecipe",
    "ConvertOpsRecipe",
    "DistillRecipe",
    "EvalRecipe",
    "ExportRecipe",
    "LossWeights",
    "PhaseRecipe",
    "PruneRecipe",
    "Recipe",
    "Section",
    "find_recipe",
    "load_recipe",
    "resolve",
    "shipped_recipes",
]
