"""How settings are written on the command line, where name, type and default in the recipe model do not say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import typer

from flashvaed_cli.cli.help import COMMON_PANEL
from flashvaed_cli.errors import RecipeError
from flashvaed_cli.recipe import shipped_recipes
from flashvaed_cli.recipe.quantities import parse_ratio

ValueT = TypeVar("ValueT")
Overrides = dict[str, object]


@dataclass(frozen=True)
class Flag:
    """The spelling of one setting.

    Attributes:
        names: flags, the longest of which errors show; by default `--field` with dashes.
        metavar: what stands for the value in the help; by default its type or its choices.
        as_text: the flag takes one text, which the recipe model parses.
        parse: turns repeated texts (`0.25`, `up3=0.125`) into recipe fields, in place of the field itself.
        default: what the help calls the default, where the model's own value does not say it.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    as_text: bool = False
    parse: Callable[[Sequence[str]], Overrides] | None = None
    default: str | None = None


def parse_by_stage(
    flag_name: str, texts: Sequence[str] | None, parse: Callable[[str], ValueT], form: str = "R or STAGE=R"
) -> tuple[ValueT | None, dict[str, ValueT]]:
    """Split repeated values `V` and `STAGE=V` into the common value and those by stage.

    Args:
        form: how to write them, for messages.
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
            raise RecipeError(f"{flag_name} {text}: {value_text!r} is not a value; write {form}.") from error
        if equals and not stage:
            raise RecipeError(f"{flag_name} {text}: nothing stands before =; write {form}.")
        if (stage in by_stage) if stage else (common is not None):
            raise RecipeError(f"{flag_name} {text}: given twice{f' for {stage}' if stage else ''}.")
        if stage:
            by_stage[stage] = value
        else:
            common = value
    return common, by_stage


def ratio_overrides(texts: Sequence[str]) -> Overrides:
    """`--ratio 0.25 --ratio up3=0.125 --ratio up3.stream=0.5` as recipe fields; a name with a dot is a channel group.

    A common ratio alone empties the recipe's ratios by stage and by group.
    """
    common, by_name = parse_by_stage("--ratio", texts, parse_ratio)
    by_group = {name: ratio for name, ratio in by_name.items() if "." in name}
    by_stage = {name: ratio for name, ratio in by_name.items() if name not in by_group}
    overrides: Overrides = {}
    if common is not None:
        overrides["keep_ratio"] = common
    if common is not None or by_stage:
        overrides["stage_keep_ratios"] = by_stage
    if common is not None or by_group:
        overrides["group_keep_ratios"] = by_group
    return overrides


def keyed_overrides(
    field: str, flag_name: str, form: str, parse: Callable[[str], object]
) -> Callable[[Sequence[str]], Overrides]:
    """The parser of repeated `KEY=VALUE` into a mapping that is the value of `field`.

    Args:
        form: what the help calls such a value, as `TERM=WEIGHT`.

    What it returns raises:
        RecipeError: a value without a key, one that does not parse, or a key given twice.
    """

    def overrides(texts: Sequence[str]) -> Overrides:
        common, by_key = parse_by_stage(flag_name, texts, parse, form)
        if common is not None:
            raise RecipeError(f"{flag_name} {common}: write {form}.")
        return {field: by_key} if by_key else {}

    return overrides


FLAGS: Mapping[str, Flag] = {
    "data": Flag(("--data", "-d"), "PATH"),
    "validation_data": Flag(metavar="PATH"),
    "output": Flag(("--output", "-o")),
    "keep_ratio": Flag(("--ratio", "-r"), "R|STAGE=R|GROUP=R", parse=ratio_overrides),
    "operators": Flag(
        ("--operator",), "STAGE=OPERATOR", parse=keyed_overrides("operators", "--operator", "STAGE=OPERATOR", str)
    ),
    "loss_weights": Flag(
        ("--loss-weight",),
        "TERM=WEIGHT",
        parse=keyed_overrides("loss_weights", "--loss-weight", "TERM=WEIGHT", float),
        default="the paper's",
    ),
    "buckets": Flag(("--bucket",), "FRAMESxHEIGHTxWIDTH", default="none"),
    "cache_latents": Flag(metavar="DIR"),
    "cache_dtype": Flag(metavar="float32|float16", as_text=True),
    "tensorboard": Flag(metavar="DIR"),
    "compare": Flag(("--compare", "-c")),
    "sizes": Flag(metavar="SIZE,...", as_text=True),
    "frames": Flag(metavar="N,...", as_text=True),
    "max_memory": Flag(metavar="AMOUNT"),
    "speed_budget": Flag(metavar="SECONDS"),
    "pipeline_seconds": Flag(metavar="SECONDS"),
    "features": Flag(metavar="FILE"),
    "require": Flag(metavar="CONDITION"),
    "junit": Flag(metavar="FILE"),
    "targets": Flag(("--target", "-t"), "safetensors|diffusers|onnx|..."),
    "decoder": Flag(("--decoder", "-d"), "FILE"),
    "size": Flag(metavar="FRAMESxHEIGHTxWIDTH"),
    "family": Flag(
        metavar="NAME",
        default="detected from names, shapes and config; ltx or ltx-video leaves only the version open",
    ),
    "weights": Flag(metavar="NAME"),
    "device": Flag(metavar="auto|cpu|gpu|cuda[:N]|mps"),
    "dtype": Flag(metavar="float32|bfloat16|float16", as_text=True),
}
"""By the name of the field, in every command that has it."""

ARGUMENTS: Mapping[str, str] = {"input": "INPUT", "latents": "LATENTS...", "files": "FILE..."}
"""Fields that are given by position: how the help shows them."""


def flag_of(field: str) -> Flag:
    """How a field is written."""
    return FLAGS.get(field, Flag())


def shown_flags() -> dict[str, str]:
    """How errors call the fields whose flag has another name than they."""
    parsed = {field: max(flag.names, key=len) for field, flag in FLAGS.items() if flag.parse is not None}
    return {
        "input": ARGUMENTS["input"],
        **parsed,
        **dict.fromkeys(("stage_keep_ratios", "group_keep_ratios"), "--ratio"),
    }


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
        rich_help_panel=COMMON_PANEL,
    ),
]
StepOption = Annotated[
    str | None,
    typer.Option(
        "--step",
        metavar="NAME",
        help="Which section of the recipe, where it has several for this command.",
        show_default=False,
        rich_help_panel=COMMON_PANEL,
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        "-f",
        help="Make a finished result again; replace results of other settings, and files of other programs.",
        rich_help_panel=COMMON_PANEL,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No progress and no logs; warnings and the result stay.", rich_help_panel=COMMON_PANEL
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "-n",
        help="Show what would be made, read and written, and about how long it would take; write nothing.",
        rich_help_panel=COMMON_PANEL,
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every layer, not the worst three.", rich_help_panel=COMMON_PANEL)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=COMMON_PANEL)
]

SWITCHES: Mapping[str, object] = {
    "recipe": RecipeOption,
    "step": StepOption,
    "dry_run": DryRunOption,
    "force": ForceOption,
    "quiet": QuietOption,
    "verbose": VerboseOption,
    "json_output": JsonOption,
}
"""What is no setting: how a command runs. By the name of the parameter."""

SOURCES = ("recipe", "step")
"""Those that name where settings come from."""
