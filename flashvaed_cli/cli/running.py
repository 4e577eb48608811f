"""What every command does: settings in, stage run, result out."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import typer
from rich.console import RenderableType
from rich.text import Text

from flashvaed_cli.cli.console import open_progress, result_console
from flashvaed_cli.cli.interruption import OutputWatch, Terminated, interruption, is_main_process
from flashvaed_cli.cli.output_lock import only_run
from flashvaed_cli.cli.streams import reader_may_leave
from flashvaed_cli.errors import OutOfMemory, is_out_of_memory
from flashvaed_cli.printable import printable_line
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe import CommandRecipe, find_recipe, load_recipe, resolve

CommandRecipeT = TypeVar("CommandRecipeT", bound=CommandRecipe)
ContravariantRecipeT = TypeVar("ContravariantRecipeT", bound=CommandRecipe, contravariant=True)

ARGV_KEY, DONE_KEY, SIGNALS_KEY = "flashvaed.argv", "flashvaed.done", "flashvaed.signals"

# Flags whose smaller values need less memory, the strongest first.
_SMALLER = ("--max-side", "--crop-size", "--max-memory", "--tile", "--chunk", "--num-frames", "--batch-size", "--sizes")


class StageResult(Protocol):
    """What every stage returns."""

    @property
    def paths(self) -> Sequence[Path]:
        """Files and folders written, the main one first."""
        ...

    def table(self) -> RenderableType:
        """For people."""
        ...

    def as_dict(self) -> Mapping[str, object]:
        """For programs: JSON values, except that infinities may occur."""
        ...


class StageFunction(Protocol, Generic[ContravariantRecipeT]):
    """`run_analyze` and its siblings."""

    def __call__(
        self, recipe: ContravariantRecipeT, *, progress: Progress, force: bool, command_line: str
    ) -> StageResult: ...


def resolve_settings(
    context: typer.Context,
    model: type[CommandRecipeT],
    overrides: Mapping[str, object],
    shown_flags: Mapping[str, str],
) -> CommandRecipeT:
    """The settings of one run, from the flags given, `--recipe` and `--step`.

    Args:
        context: its parameters named like fields of `model` are flags; None or empty means not given.
        model: the command's recipe model.
        overrides: fields whose flags were parsed beforehand.
        shown_flags: what errors call fields whose parameter has a different name.
    Raises:
        RecipeError: flags or recipe do not fit.
    """
    params = context.params
    given: dict[str, object] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in params.items()
        if name in model.model_fields and value is not None and value != () and value != []
    }
    flags = {p.name: max(p.opts, key=len) for p in context.command.params if p.name and p.opts[0].startswith("-")}
    given |= overrides
    recipe = load_recipe(find_recipe(params["recipe"])) if params.get("recipe") else None
    return resolve(model, recipe, given, step=params.get("step"), flags={**flags, **shown_flags})


def run_stage(
    context: typer.Context,
    stage: StageFunction[CommandRecipeT],
    recipe: CommandRecipeT,
    *,
    result_on_stderr: bool = False,
) -> StageResult:
    """Run a stage with progress on stderr, then print its result to stdout, and return it.

    If a launcher started several processes, only the main one prints.

    Args:
        result_on_stderr: stdout carries the data themselves.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, except during training, which saves first.
        OutOfMemory: on any device; names the flags of this command that need less.
    """
    output = OutputWatch(getattr(recipe, "output", None))
    if context.params["quiet"]:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    try:
        with only_run(_locked_output(context, recipe)), open_progress(quiet=context.params["quiet"]) as progress:
            result = stage(
                recipe, progress=progress, force=context.params.get("force", False), command_line=command_line(context)
            )
    except KeyboardInterrupt as error:  # stages write their output whole, at the end
        raise interruption(error, output.outcome()) from error
    except Exception as error:
        if received := context.meta.get(
            SIGNALS_KEY
        ):  # the exception that the signal raised became another error on its way
            raise interruption(Terminated(received[0]), output.outcome()) from error
        if is_out_of_memory(error):
            raise OutOfMemory(_memory_advice(context, error)) from error
        raise
    context.meta[DONE_KEY] = True
    if is_main_process():
        with reader_may_leave(has_written=bool(result.paths)):
            _print_result(context, result, on_stderr=result_on_stderr)
    return result


def _locked_output(context: typer.Context, recipe: CommandRecipe) -> str | None:
    """The output that no other run may write meanwhile; several decode into one folder."""
    output: str | None = getattr(recipe, "output", None)
    if output is None or context.params.get("dry_run") or not is_main_process():
        return None
    return output if context.command.name != "decode" or Path(output).suffix else None


def _memory_advice(context: typer.Context, error: BaseException) -> str:
    """What ran out, and which flags of this command need less."""
    where = "the GPU is" if "CUDA" in str(error) else "this machine is"
    flags = {name for p in context.command.params for name in p.opts}
    smaller = [flag for flag in _SMALLER if flag in flags]
    advice = f"Give {', '.join(smaller)} (smaller values need less)" if smaller else "Close other programs"
    return f"out of memory: {where} full. {advice}, or use a machine with more."


def _print_result(context: typer.Context, result: StageResult, *, on_stderr: bool = False) -> None:
    if context.params["json_output"]:
        kind = {"kind": f"flashvaed-{context.command.name}", "schema": 1}
        document = {**kind, **result.as_dict(), "paths": [str(path) for path in result.paths]}
        typer.echo(json.dumps(_finite(document), indent=2, allow_nan=False), err=on_stderr)
        return
    console = result_console(on_stderr=on_stderr)
    if context.params.get("verbose") and (detailed := getattr(result, "detailed", None)) is not None:
        console.print(detailed())
    console.print(result.table())
    for path in result.paths if getattr(result, "is_new", True) else ():
        console.print(Text(printable_line(f"wrote {path}")), soft_wrap=True)
    if following := getattr(result, "next_commands", ()):
        console.print(Text("next:"))
        for command in following:
            console.print(Text(printable_line(f"  {command}")), soft_wrap=True)


def command_line(context: typer.Context) -> str:
    """What the user typed, quoted so that it can be pasted into a shell."""
    return shlex.join(["flashvaed", *context.meta.get(ARGV_KEY, [])])


def _finite(value: object) -> object:
    """JSON has no infinities (the PSNR of equal clips), so write them as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
