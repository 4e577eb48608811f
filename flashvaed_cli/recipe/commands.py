"""The commands by name, each with its settings model."""

from __future__ import annotations

from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.recipe.convert_ops import ConvertOpsRecipe
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.recipe.settings import CommandRecipe

COMMAND_RECIPES: dict[str, type[CommandRecipe]] = {
    model.command: model
    for model in (AnalyzeRecipe, PruneRecipe, ConvertOpsRecipe, DistillRecipe, EvalRecipe, ExportRecipe)
}
