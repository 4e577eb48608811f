"""Flags made from the recipe models: same names, help texts and defaults.

Every flag's own default is None (or an empty list), so that only what was really given overrides the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.recipe import AnalyzeRecipe, CommandRecipe, shipped_recipes
from flashvaed_cli.recipe.quantities import parse_ratio

ValueT = TypeVar("ValueT")

_COMMON = "Common"


def flag(model: type[CommandRecipe], field: str, *names: str, default: str | None = None, **settings: Any) -> Any:
    """The typer option of one field of a recipe.

    Args:
        model: the command's recipe model.
        field: its field; the parameter must have the same name.
        names: flags; by default `--field` with dashes.
        default: what to call the default, where the model's own value does not say it.
        settings: handed to `typer.Option`.
    """
    info = model.model_fields[field]
    shown = _shown_default(info.default) if default is None else default
    names = names or ("--" + field.replace("_", "-"),)
    help_text = f"{info.description} Default: {shown}." if shown else info.description
    return typer.Option(*names, help=help_text, show_default=False, **settings)


def switch(model: type[CommandRecipe], field: str, **settings: Any) -> Any:
    """The typer option `--field/--no-field` of a yes-or-no field."""
    dashed = field.replace("_", "-")
    return flag(model, field, f"--{dashed}/--no-{dashed}", **settings)


def input_argument(model: type[CommandRecipe]) -> Any:
    """The positional argument: what the command reads, and where it looks without one."""
    places = model.default_inputs
    shown = places[0] if len(places) == 1 else "the first that exists of " + ", ".join(places)
    help_text = f"{model.model_fields['input'].description} Default: {shown}."
    return typer.Argument(metavar="INPUT", help=help_text, show_default=False)


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    if value is None or isinstance(value, dict | BaseModel):
        return ""
    return str(value)


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in sorted(shipped_recipes()) if name.startswith(incomplete)]


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Read settings from a YAML recipe: a file, or the bare name of a shipped one. Flags win over it.",
        autocompletion=_complete_recipe,
        show_default=False,
        rich_help_panel=_COMMON,
    ),
]
StepOption = Annotated[
    str | None,
    typer.Option(
        "--step",
        metavar="NAME",
        help="Which section of the recipe, where it has several for this command.",
        show_default=False,
        rich_help_panel=_COMMON,
    ),
]
FAMILY_DEFAULT = "told by names, shapes and configuration; ltx or ltx-video leaves only the version to them"
FamilyOption = Annotated[
    str | None, flag(AnalyzeRecipe, "family", default=FAMILY_DEFAULT, metavar="NAME", rich_help_panel=_COMMON)
]
WeightsOption = Annotated[str | None, flag(AnalyzeRecipe, "weights", metavar="NAME", rich_help_panel=_COMMON)]
AllowDownloadOption = Annotated[bool | None, switch(AnalyzeRecipe, "allow_download", rich_help_panel=_COMMON)]
DeviceOption = Annotated[
    str | None, flag(AnalyzeRecipe, "device", metavar="auto|cpu|gpu|cuda[:N]|mps", rich_help_panel=_COMMON)
]
DTypeOption = Annotated[
    str | None, flag(AnalyzeRecipe, "dtype", metavar="float32|bfloat16|float16", rich_help_panel=_COMMON)
]
SeedOption = Annotated[int | None, flag(AnalyzeRecipe, "seed", rich_help_panel=_COMMON)]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        "-f",
        help="Make a finished result again; replace results of other settings, and files of other programs.",
        rich_help_panel=_COMMON,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No progress and no logs; warnings and the result stay.", rich_help_panel=_COMMON
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "-n",
        help="Show what would be made, read and written, and about how long it would take; write nothing.",
        rich_help_panel=_COMMON,
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every layer, not the worst three.", rich_help_panel=_COMMON)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=_COMMON)
]

DATA_SETTINGS = {"metavar": "PATH"}
RATIO_SETTINGS = {"metavar": "R|STAGE=R|GROUP=R"}

NO_RATIOS: dict[str, object] = {"keep_ratio": None, "stage_keep_ratios": {}, "group_keep_ratios": {}}
"""Puts a target that was given as a flag in place of the recipe's ratios."""


def parse_by_stage(
    flag_name: str, texts: Sequence[str] | None, parse: Callable[[str], ValueT]
) -> tuple[ValueT | None, dict[str, ValueT]]:
    """Split repeated values `V` and `STAGE=V` into the common value and those by stage.

    Raises:
        RecipeError: a value does not parse, or is given twice.
    """
    common: ValueT | None = None
    by_stage: dict[str, ValueT] = {}
    for text in texts or ():
        stage, equals, value_text = text.rpartition("=")
        try:
            value = parse(value_text)
        except ValueError as error:
            raise RecipeError(f"{flag_name} {text}: {value_text!r} is not a value; write V or STAGE=V.") from error
        if equals and not stage:
            raise RecipeError(f"{flag_name} {text}: the stage before = is missing.")
        if (stage in by_stage) if stage else (common is not None):
            raise RecipeError(f"{flag_name} {text}: given twice{f' for {stage}' if stage else ''}.")
        if stage:
            by_stage[stage] = value
        else:
            common = value
    return common, by_stage


def ratio_overrides(texts: Sequence[str] | None) -> dict[str, object]:
    """`--ratio 0.25 --ratio up3=0.125 --ratio up3.stream=0.5` as recipe fields; a name with a dot is a channel group.

    A common ratio alone empties the recipe's ratios by stage and by group.
    """
    common, by_name = parse_by_stage("--ratio", texts, parse_ratio)
    by_group = {name: ratio for name, ratio in by_name.items() if "." in name}
    by_stage = {name: ratio for name, ratio in by_name.items() if name not in by_group}
    overrides: dict[str, object] = {}
    if common is not None:
        overrides["keep_ratio"] = common
    if common is not None or by_stage:
        overrides["stage_keep_ratios"] = by_stage
    if common is not None or by_group:
        overrides["group_keep_ratios"] = by_group
    return overrides


def keyed_overrides(flag_name: str, texts: Sequence[str] | None, parse: Callable[[str], ValueT]) -> dict[str, ValueT]:
    """Repeated `KEY=VALUE` as a mapping.

    Raises:
        RecipeError: a value without a key, one that does not parse, or a key given twice.
    """
    common, by_key = parse_by_stage(flag_name, texts, parse)
    if common is not None:
        raise RecipeError(f"{flag_name} {common}: write KEY=VALUE.")
    return by_key
