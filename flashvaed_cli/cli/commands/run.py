"""`flashvaed run` and `flashvaed recipes`: a whole recipe in one command, and a list of the shipped ones."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.text import Text

from flashvaed_cli.cli.console import print_step, result_console
from flashvaed_cli.cli.flags import QuietOption
from flashvaed_cli.cli.help import GroupedCommand
from flashvaed_cli.cli.signature import USING_PANEL
from flashvaed_cli.errors import RecipeError
from flashvaed_cli.printable import printable
from flashvaed_cli.recipe import COMMAND_RECIPES, Recipe, Section, find_recipe, load_recipe, shipped_recipes
from flashvaed_cli.recipe.fields import BUILTIN_VAE

_FITTING = ("analyze", "prune", "convert-ops", "distill")
"""The commands that take `--data`; `eval` judges other clips."""

RUN_EPILOG = """Examples:

flashvaed run demo

flashvaed run fast Wan2.1_VAE.pth --data clips/ --judge held-out/

flashvaed run mine.yaml --device gpu --force"""
RECIPES_EPILOG = """Examples:

flashvaed recipes

flashvaed recipes fast > mine.yaml"""


@dataclass(frozen=True)
class Step:
    """One command of a recipe, as it would be typed."""

    section: Section
    words: tuple[str, ...]

    @property
    def shown(self) -> str:
        """For people, and for a shell."""
        return shlex.join(["flashvaed", *self.words])


def register(app: typer.Typer) -> None:
    """Add both commands to the program."""
    app.command("run", cls=GroupedCommand, epilog=RUN_EPILOG, rich_help_panel=USING_PANEL)(run)
    app.command("recipes", cls=GroupedCommand, epilog=RECIPES_EPILOG, rich_help_panel=USING_PANEL)(recipes)


def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the bare name of a shipped one.")],
    original: Annotated[
        str | None,
        typer.Argument(
            metavar="ORIGINAL",
            help="The checkpoint that the chain starts from. Default: builtin:tiny-wan.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="PATH",
            help="Clips to calibrate and train on; repeatable. Default: the shipped ones.",
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="PATH", help="Clips for eval, not among --data; repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="auto|cpu|gpu|cuda[:N]|mps", help="For every step.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Redo everything, finished or not.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Run the steps of a recipe in order, in this folder; what is up to date is skipped.

    The first step that fails ends the run, with its exit code; the same command resumes from there.
    """
    loaded = load_recipe(find_recipe(recipe))
    common = [
        *(("--device", device) if device else ()),
        *(("--force",) if force else ()),
        *(("--quiet",) if quiet else ()),
    ]
    steps = list(plan_steps(loaded, recipe, original, data or (), judge or (), common))
    program: Any = context.find_root().command
    started = time.perf_counter()
    for number, step in enumerate(steps, start=1):
        print_step(f"[{number}/{len(steps)}] {step.shown}")
        code = program.main(args=list(step.words), prog_name="flashvaed", standalone_mode=False)
        if code:
            print_step(f"step {number} of {len(steps)} failed; the same command resumes from there")
            raise typer.Exit(code)
    print_step(f"{len(steps)} steps done in {time.perf_counter() - started:.0f} s")


def plan_steps(
    recipe: Recipe, name: str, original: str | None, data: Sequence[str], judge: Sequence[str], common: Sequence[str]
) -> Iterator[Step]:
    """The command lines of a recipe. A step reads what an earlier one wrote, or else the original.

    Args:
        name: of the recipe, as passed to the commands.
    """
    written: set[str] = set()
    for section in recipe.sections:
        model = COMMAND_RECIPES[section.command]
        inputs = model.model_fields.get("input")
        settings = section.settings
        words: list[str] = [section.command]
        named = settings.get("input")
        if inputs is not None and named is None:
            words.append(next((place for place in model.default_inputs if place in written), original or BUILTIN_VAE))
        elif inputs is not None and original is not None and named not in written:
            words.append(original)
        words += ["--recipe", name, *(("--step", section.name) if section.name else ())]
        clips = data if section.command in _FITTING else judge if section.command == "eval" else ()
        words += [word for place in clips for word in ("--data", place)]
        written.add(str(settings.get("output", model.model_fields["output"].default)))
        yield Step(section, (*words, *common))


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Print this recipe as YAML. Default: list all.", show_default=False),
    ] = None,
) -> None:
    """List the recipes that ship with the program, or print one as a starting point for your own."""
    shipped = shipped_recipes()
    console = result_console()
    if name is None:
        width = max(map(len, shipped))
        for known, path in sorted(shipped.items()):
            recipe = load_recipe(path)
            steps = ", ".join(section.command for section in recipe.sections)
            console.print(Text.assemble((f"{known:{width}}", "bold"), f"  {recipe.description}"))
            console.print(Text(f"{'':{width}}  {steps}", style="dim"))
        return
    if name not in shipped:
        raise RecipeError(f"no shipped recipe is called {name}; choose from {', '.join(sorted(shipped))}.")
    typer.echo(printable(shipped[name].read_text(encoding="utf-8")), nl=False)
