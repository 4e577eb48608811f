"""Commands made from recipe models: every setting is a flag with the model's name, type, default and description.

A flag's own default is None (or an empty list), so that only flags actually given override the recipe.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from flashvaed_cli.cli.flags import ARGUMENTS, SOURCES, SWITCHES, Overrides, flag_of, shown_flags
from flashvaed_cli.cli.help import COMMON_PANEL, GroupedCommand, table
from flashvaed_cli.cli.running import CommandRecipeT, resolve_settings
from flashvaed_cli.recipe.settings import RULE_MEANINGS

COMMON = ("family", "weights", "allow_download", "device", "dtype", "seed")
"""Settings that every command of the pipeline has; they come last in its help."""

PIPELINE_SWITCHES = ("recipe", "step", "force", "quiet", "json_output")
"""Flags of such a command that are not settings; see `flashvaed_cli.cli.flags.SWITCHES`."""

PREVIEWED_SWITCHES = ("recipe", "step", "dry_run", "force", "quiet", "json_output")
"""The same for commands with `--dry-run`."""

CALIBRATION_CLIPS = ("data", "latent_scale", "num_calibration_clips", "num_frames", "crop_size", "max_side")
"""Settings for the clips that statistics are collected on."""

USING_PANEL = "Using a result"
"""Where `--help` shows the commands outside the pipeline."""


@dataclass(frozen=True)
class Command(Generic[CommandRecipeT]):
    """One command of the program.

    Attributes:
        recipe: the model of its settings.
        run: what it does with them; its docstring is the help text.
        options: the fields that are flags, in the help's order; a field in no panel is for recipes only.
        panels: further flags, by heading.
        common: the flags under the last heading.
        switches: flags that are not settings; names of `flashvaed_cli.cli.flags.SWITCHES`.
        examples: command lines for the help.
        defaults: how the help describes a default, by field, where neither model nor `FLAGS` does for this command.
        amend: what the given flags imply for other fields, by field name.
        help_panel: where the program's own help lists the command.
    """

    recipe: type[CommandRecipeT]
    run: Callable[[typer.Context, CommandRecipeT], None]
    examples: Sequence[str]
    options: Sequence[str]
    panels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    common: Sequence[str] = COMMON
    switches: Sequence[str] = PIPELINE_SWITCHES
    defaults: Mapping[str, str] = field(default_factory=dict)
    amend: Callable[[Mapping[str, Any]], Overrides] = lambda _given: {}
    help_panel: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The settings that can be given on the command line."""
        by_position = (name for name in ARGUMENTS if name in self.recipe.model_fields)
        panels = (name for names in self.panels.values() for name in names)
        return (*by_position, *self.options, *panels, *self.common)

    def add_to(self, app: typer.Typer) -> None:
        """Register it as a command of the program."""
        rules = table(RULE_MEANINGS) if "rule" in self.fields else []
        notes = ["Rules, by the channels that they keep, and when to use them:", *rules] if rules else []
        epilog = "\n\n".join(["Examples:", *self.examples, *notes])
        add = app.command(self.recipe.command, cls=GroupedCommand, epilog=epilog, rich_help_panel=self.help_panel)
        add(self._function())

    def _function(self) -> Callable[..., None]:
        parameters = list(self._parameters())

        def command(**given: Any) -> None:
            context = given["context"]
            overrides = {**self.amend(given), **self._parsed(given)}
            self.run(context, resolve_settings(context, self.recipe, overrides, shown_flags()))

        command.__doc__ = self.run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    def _parsed(self, given: Mapping[str, Any]) -> Overrides:
        overrides: Overrides = {}
        for name in self.fields:
            if (parse := flag_of(name).parse) is not None and given[parameter_name(name)]:
                overrides |= parse(given[parameter_name(name)])
        return overrides

    def _parameters(self) -> Iterator[inspect.Parameter]:
        yield _parameter("context", typer.Context, inspect.Parameter.empty)
        for name in ARGUMENTS:
            if name in self.recipe.model_fields:
                yield self._argument(name)
        for name in self.options:
            yield self._option(name)
        for panel, names in self.panels.items():
            for name in names:
                yield self._option(name, panel)
        for switch in (name for name in self.switches if name in SOURCES):
            yield _parameter(switch, SWITCHES[switch], None)
        for name in self.common:
            yield self._option(name, COMMON_PANEL)
        for switch in (name for name in self.switches if name not in SOURCES):
            yield _parameter(switch, SWITCHES[switch], False)

    def _argument(self, name: str) -> inspect.Parameter:
        info = self.recipe.model_fields[name]
        help_text = info.description
        if not info.is_required():
            places = self.recipe.default_inputs
            shown = places[0] if len(places) == 1 else "the first that exists of " + ", ".join(places)
            help_text = f"{help_text} Default: {shown}."
        kind = cli_type(info.annotation)
        argument = typer.Argument(metavar=ARGUMENTS[name], help=help_text, show_default=False)
        if info.is_required():
            return _parameter(name, Annotated[kind, argument], inspect.Parameter.empty)
        return _parameter(name, Annotated[kind | None, argument], None)

    def _option(self, name: str, panel: str | None = None) -> inspect.Parameter:
        info, flag = self.recipe.model_fields[name], flag_of(name)
        kind = list[str] if flag.parse else str if flag.as_text else cli_type(info.annotation)
        dashed = name.replace("_", "-")
        names = flag.names or ((f"--{dashed}/--no-{dashed}",) if kind is bool else (f"--{dashed}",))
        shown = self.defaults.get(name) or flag.default or _shown_default(info.default)
        help_text = f"{info.description} Default: {shown}." if shown else info.description
        option = typer.Option(*names, help=help_text, metavar=flag.metavar, show_default=False, rich_help_panel=panel)
        return _parameter(parameter_name(name), Annotated[kind | None, option], None)


def parameter_name(field_name: str) -> str:
    """The parameter's name for a field: the field's own, unless the flag's texts are parsed first."""
    flag = flag_of(field_name)
    return field_name if flag.parse is None else max(flag.names, key=len).lstrip("-").replace("-", "_")


def cli_type(annotation: Any) -> Any:
    """The type of a flag for a field: str, int, float, bool, a Literal, or `list[str]` for a tuple."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return cli_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        (kind,) = (argument for argument in get_args(annotation) if argument is not types.NoneType)
        return cli_type(kind)
    if origin is tuple:
        return list[str]
    if origin is Literal or annotation in (str, int, float, bool):
        return annotation
    raise TypeError(f"no flag takes {annotation}")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    if value is None or isinstance(value, dict | BaseModel):
        return ""
    return str(value)
