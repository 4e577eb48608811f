"""Find and read recipe files, and combine them with flags.

A recipe is one section, `prune: {keep_ratio: 0.25}`, or a chain of them under `steps:`. Every section belongs
to one command; if there are several for a command, each has a `name`, by which `--step` chooses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from flashvaed_cli.errors import RecipeError, TensorFileError
from flashvaed_cli.limits import MAX_LISTED_MISTAKES, MAX_QUOTED_CHARS, MAX_RECIPE_BYTES
from flashvaed_cli.recipe.commands import COMMAND_RECIPES
from flashvaed_cli.recipe.settings import CommandRecipe
from flashvaed_cli.recipe.yaml_source import YamlSource, parse_yaml
from flashvaed_cli.untrusted.files import read_bounded

CommandRecipeT = TypeVar("CommandRecipeT", bound=CommandRecipe)

_PACKAGE = Path(__file__).resolve().parent
# In an installed wheel, then in a clone.
SHIPPED_FOLDERS = (_PACKAGE / "shipped", _PACKAGE.parent.parent / "recipes")


@dataclass(frozen=True)
class Section:
    """The settings that a recipe gives for one run of one command; the rest are defaults.

    `lines` are the line numbers of the settings, and of the keys in them, by path.
    """

    command: str
    name: str | None
    settings: Mapping[str, object]
    line: int
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe file."""

    source: str
    description: str
    sections: tuple[Section, ...]

    def select(self, command: str, step: str | None) -> Section:
        """The section for one run of a command.

        Args:
            command: name on the command line (`convert-ops`).
            step: name of the section; may be None if the command has only one.
        Raises:
            RecipeError: no such section, or more than one and no `step`.
        """
        own = [section for section in self.sections if section.command == command]
        if not own:
            listed = ", ".join(dict.fromkeys(section.command for section in self.sections))
            raise RecipeError(f"{self.source} has no section for {command}; it has: {listed}.")
        names = ", ".join(section.name for section in own if section.name) or "none is named"
        if step is not None:
            for section in own:
                if section.name == step:
                    return section
            raise RecipeError(f"--step {step}: {self.source} has no {command} section of that name ({names}).")
        if len(own) > 1:
            raise RecipeError(f"{self.source} has {len(own)} {command} sections: choose one by --step ({names}).")
        return own[0]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the program, by bare name."""
    found = [path for folder in SHIPPED_FOLDERS for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: path for path in reversed(found)}


def find_recipe(name_or_path: str) -> Path:
    """A recipe file by path, or a shipped one by bare name (`demo`).

    Raises:
        RecipeError: neither a file nor a shipped name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    names = ", ".join(sorted(shipped))
    raise RecipeError(f"--recipe {name_or_path}: no such file, and no shipped recipe of that name (shipped: {names}).")


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or does not fit the schema; names every mistake and its line.
    """
    source = str(path)
    try:
        text = read_bounded(Path(path), MAX_RECIPE_BYTES).decode("utf-8")
    except TensorFileError as error:
        raise RecipeError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} cannot be read as a recipe: {error}") from error
    parsed = parse_yaml(text, source=source)
    problems = list(parsed.problems)
    recipe = _read_document(parsed, source, problems)
    if problems:
        raise RecipeError(_listing(source, [f"line {line}: {message}" for line, message in sorted(problems)]))
    return recipe


def resolve(
    model: type[CommandRecipeT],
    recipe: Recipe | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    step: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> CommandRecipeT:
    """Combine flags, recipe and defaults into the settings of one run: flags win over recipe over defaults.

    Mappings (`stage_keep_ratios`, `loss_weights`) are merged key by key; an empty one in `overrides` empties them.
    A stage's ratio as a flag takes the place of the recipe's ratios for the channel groups of that stage.

    Args:
        model: the command's model.
        recipe: a loaded recipe, or None.
        overrides: values given on the command line, by field name.
        step: name of the recipe's section.
        flags: field name to flag, for errors (`keep_ratio: --ratio`).
    Raises:
        RecipeError: no fitting section, or values that do not fit; names every mistake.
    """
    if step is not None and recipe is None:
        raise RecipeError(f"--step {step} chooses a section of a recipe: give --recipe too.")
    section = recipe.select(model.command, step) if recipe else None
    overrides = overrides or {}
    merged = _merge(_without_overridden_groups(section.settings if section else {}, overrides), overrides)
    try:
        settings = model.model_validate(merged)
    except ValidationError as error:
        flags = flags or {}
        lines = []
        for location, message, value in _flatten(error, model):
            field = str(location[0]) if location else ""
            if field in overrides:
                flag = flags.get(field, "--" + field.replace("_", "-"))
                where = ".".join([flag, *map(str, location[1:])])
            else:
                where = _dotted((model.command, *location))
            names = {field: flags.get(field, "--" + field.replace("_", "-")) for field in overrides}
            lines.append(f"{where}{value}: {_named(message, names)}")
        origin = f"flashvaed {model.command}" + (f" with {recipe.source}" if recipe else "")
        raise RecipeError(_listing(origin, lines)) from error
    if recipe is not None and section is not None:
        settings.remember_origins(_origins(recipe, section, merged, overrides))
    return settings


def _origins(
    recipe: Recipe, section: Section, merged: Mapping[str, object], overrides: Mapping[str, object]
) -> dict[tuple[str, ...], str]:
    """Where in the recipe each value that it decides is set, by field or by field and key."""

    def decides(path: tuple[str, ...]) -> bool:
        above, left = overrides.get(path[0]), merged.get(path[0])
        if len(path) == 1:
            return path[0] not in overrides
        return isinstance(left, Mapping) and path[1] in left and not (isinstance(above, Mapping) and path[1] in above)

    return {
        path: f"{recipe.source}, line {line}: {_dotted((section.command, *path))}"
        for path, line in section.lines.items()
        if decides(path)
    }


def _without_overridden_groups(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """The recipe without its ratios for channel groups in stages whose ratio is given as a flag."""
    stages, groups = above.get("stage_keep_ratios"), below.get("group_keep_ratios")
    if not isinstance(stages, Mapping) or not isinstance(groups, Mapping):
        return dict(below)
    left = {name: ratio for name, ratio in groups.items() if str(name).partition(".")[0] not in stages}
    return {**below, "group_keep_ratios": left}


def _named(message: str, flags: Mapping[str, str]) -> str:
    """A message with its `fields` as the reader knows them: by flag if one was given, else as in the recipe."""
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), message)


def _merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping) and value:
            merged[key] = {**under, **value}
        else:
            merged[key] = value
    return merged


def _read_document(parsed: YamlSource, source: str, problems: list[tuple[int, str]]) -> Recipe:
    document = parsed.value
    if not isinstance(document, dict) or not document:
        raise RecipeError(f"{source}: a recipe is a mapping with one of {', '.join(COMMAND_RECIPES)}, or `steps:`.")
    description = document.get("description", "")
    if not isinstance(description, str):
        problems.append((parsed.line(("description",)), f"description = {quoted(description)}: must be a text"))
    commands = [key for key in document if key in COMMAND_RECIPES]
    for key in document:
        if key not in ("description", "steps", *COMMAND_RECIPES):
            hint = _suggestion(key, ["description", "steps", *COMMAND_RECIPES])
            problems.append((parsed.line((_key(key),)), f"{key} = {quoted(document[key])}: unknown key{hint}"))
    if len(commands) + ("steps" in document) != 1 and not problems:
        problems.append((1, f"expected one of {', '.join(COMMAND_RECIPES)}, or `steps:` with a list of them"))
    sections = [_read_section(parsed, (command,), command, document[command], problems) for command in commands]
    if "steps" in document:
        sections += list(_read_steps(parsed, document["steps"], problems))
    _check_names(sections, problems)
    return Recipe(source=source, description=str(description), sections=tuple(sections))


def _read_steps(parsed: YamlSource, steps: object, problems: list[tuple[int, str]]) -> Iterator[Section]:
    if not isinstance(steps, tuple) or not steps:
        problems.append((parsed.line(("steps",)), "steps: must be a list of sections, `- prune: {...}`"))
        return
    for index, step in enumerate(steps):
        path = ("steps", index)
        if not isinstance(step, dict) or len(step) != 1:
            problems.append(
                (parsed.line(path), f"steps[{index}]: must have one key, the command, as in `- prune: {{}}`")
            )
            continue
        command = next(iter(step))
        if command not in COMMAND_RECIPES:
            hint = _suggestion(command, list(COMMAND_RECIPES))
            message = f"steps[{index}].{command} = {quoted(step[command])}: unknown command{hint}"
            problems.append((parsed.line(path), message))
            continue
        yield _read_section(parsed, (*path, str(command)), str(command), step[command], problems)


def _read_section(
    parsed: YamlSource, path: tuple[str | int, ...], command: str, value: object, problems: list[tuple[int, str]]
) -> Section:
    line = parsed.line(path)
    if value is not None and not isinstance(value, dict):
        problems.append((line, f"{_dotted(path)} = {quoted(value)}: must be a mapping of settings"))
        value = None
    settings = dict(value or {})
    name = settings.pop("name", None)
    if name is not None and not (isinstance(name, str) and name):
        problems.append((parsed.line((*path, "name")), f"{_dotted((*path, 'name'))} = {quoted(name)}: must be a text"))
        name = None
    try:
        COMMAND_RECIPES[command].model_validate(settings)
    except ValidationError as error:
        for location, message, shown in _flatten(error, COMMAND_RECIPES[command]):
            full = (*path, *location)
            problems.append((parsed.line(full), f"{_dotted(full)}{shown}: {_named(message, {})}"))
    return Section(command=command, name=name, settings=settings, line=line, lines=_lines(parsed, path, settings))


def _lines(
    parsed: YamlSource, path: tuple[str | int, ...], settings: Mapping[object, object]
) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    for field_name, value in settings.items():
        keys = value if isinstance(value, Mapping) else ()
        for inner in ((field_name,), *((field_name, key) for key in keys)):
            found[tuple(map(str, inner))] = parsed.line((*path, *map(_key, inner)))
    return found


def _check_names(sections: Sequence[Section], problems: list[tuple[int, str]]) -> None:
    first: dict[tuple[str, str], Section] = {}
    for section in sections:
        repeated = sum(other.command == section.command for other in sections) > 1
        if repeated and section.name is None:
            problems.append(
                (section.line, f"{section.command}: one of several sections of this command needs a `name:`")
            )
        elif section.name is not None:
            other = first.setdefault((section.command, section.name), section)
            if other is not section:
                problems.append(
                    (section.line, f"{section.command}: the name {section.name} is taken on line {other.line}")
                )


def _flatten(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Location, message and ` = value` of every mistake."""
    items = error.errors(include_url=False)
    locations = [tuple(item["loc"]) for item in items]
    for item, location in zip(items, locations, strict=True):
        if location and any(location == other[: len(location)] != other for other in locations):
            continue  # only follows from a mistake inside it
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        message = f"must be {message}" if item["msg"].startswith("Input should be ") else message
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(location[-1], _field_names(model, location[:-1]))}"
        # A mistake of the whole section has no value of its own worth printing.
        yield location, message, f" = {quoted(item['input'])}" if location and item["type"] != "missing" else ""


def _field_names(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys allowed at a location; empty where it is not a model."""
    for part in location:
        if isinstance(part, int):
            continue
        if part not in model.model_fields:
            return []
        inner = model.model_fields[part].annotation
        candidates = (inner, *getattr(inner, "__args__", ()))
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _suggestion(key: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(key)[:MAX_QUOTED_CHARS], known, n=1)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})" if known else ""


def _key(key: object) -> str | int:
    return key if isinstance(key, str | int) else str(key)


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:MAX_QUOTED_CHARS]}" for part in path)
    return text.removeprefix(".")


def _listing(source: str, mistakes: list[str]) -> str:
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    shown = [
        mistake if len(mistake) <= 400 else f"{mistake[:200]} ... {mistake[-150:]}"
        for mistake in mistakes[:MAX_LISTED_MISTAKES]
    ]
    more = [f"and {len(mistakes) - len(shown)} more"] if len(mistakes) > len(shown) else []
    return "\n  ".join([f"{source}: {count}", *shown, *more])


def quoted(value: object) -> str:
    """A value for a message, shortened if long."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."
