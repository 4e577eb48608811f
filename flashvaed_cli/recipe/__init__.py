"""Pydantic schemas of the YAML recipes. Imports no torch."""

from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.recipe.commands import COMMAND_RECIPES
from flashvaed_cli.recipe.convert_ops import ConvertOpsRecipe
from flashvaed_cli.recipe.decode import DecodeRecipe
from flashvaed_cli.recipe.distill import DistillRecipe, LossWeightSettings, PhaseRecipe
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.recipe.info import InfoRecipe
from flashvaed_cli.recipe.loading import Recipe, Section, find_recipe, load_recipe, resolve, shipped_recipes
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.recipe.settings import CommandRecipe

__all__ = [
    "COMMAND_RECIPES",
    "AnalyzeRecipe",
    "CommandRecipe",
    "ConvertOpsRecipe",
    "DecodeRecipe",
    "DistillRecipe",
    "EvalRecipe",
    "ExportRecipe",
    "InfoRecipe",
    "LossWeightSettings",
    "PhaseRecipe",
    "PruneRecipe",
    "Recipe",
    "Section",
    "find_recipe",
    "load_recipe",
    "resolve",
    "shipped_recipes",
]
