"""YAML text to plain Python values, with the line of every value.

Stricter than PyYAML: a repeated key is an error. And `1e-4` is a number (YAML 1.2), not a text (YAML 1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml
import yaml.reader

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.limits import MAX_JSON_DEPTH, MAX_RECIPE_VALUES

_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class YamlSource:
    """A parsed document: `value` (sequences as tuples), the line of every path, and the problems found on the way."""

    value: object
    lines: dict[Path, int]
    problems: list[tuple[int, str]] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """Line (from 1) of the deepest known part of a path."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse_yaml(text: str, *, source: str) -> YamlSource:
    """Parse one YAML document.

    Args:
        text: the document.
        source: what to call it in errors.
    Raises:
        RecipeError: not YAML, more than one document, an alias that contains itself, or more than the limits allow.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        parsed = YamlSource(value=None, lines={(): 1})
        if node is None:
            return parsed
        value = _build(loader, node, (), parsed, frozenset())
        return YamlSource(value=value, lines=parsed.lines, problems=parsed.problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{source} is not valid YAML. {line}{error.problem or error.context}.") from error
    except RecursionError:
        raise RecipeError(f"{source} is nested deeper than {MAX_JSON_DEPTH} levels, which no recipe needs.") from None
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(str(error.character)[0])
        raise RecipeError(f"{source} is not valid YAML: it holds the control character {character:#04x}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{source} is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _build(loader: _Loader, node: yaml.Node, path: Path, parsed: YamlSource, above: frozenset[int]) -> object:
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_TAGS:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
    if len(path) > MAX_JSON_DEPTH:
        raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_JSON_DEPTH} levels", problem_mark=node.start_mark)
    if len(parsed.lines) > MAX_RECIPE_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_RECIPE_VALUES} values", problem_mark=node.start_mark)
    parsed.lines.setdefault(path, node.start_mark.line + 1)
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, parsed, above)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_build(loader, child, (*path, i), parsed, above) for i, child in enumerate(node.value))
    return _scalar(loader, node)


def _scalar(loader: _Loader, node: yaml.Node) -> object:
    try:
        return loader.construct_object(node)
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        TypeError,
    ):  # what PyYAML raises for tags that do not fit
        what = f"{node.value!r:.60} is not a valid {node.tag.rpartition(':')[2]:.40}"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: Path, parsed: YamlSource, above: frozenset[int]
) -> dict[object, object]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a plain text", problem_mark=key_node.start_mark)
        if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
            parsed.problems.append((key_node.start_mark.line + 1, f"{key_node.value}: this key is given twice"))
        seen.add(key_node.value)
    # Several merges, or merges of lists, can double at every level.
    merges = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
    if len(merges) > 1 or not all(isinstance(value, yaml.MappingNode) for value in merges):
        raise yaml.MarkedYAMLError(problem="<< merges one mapping only", problem_mark=node.start_mark)
    loader.flatten_mapping(node)
    result: dict[object, object] = {}
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node)
        key_path = (*path, key if isinstance(key, str | int) else str(key))
        parsed.lines[key_path] = key_node.start_mark.line + 1
        result[key] = _build(loader, value_node, key_path, parsed, above)
    return result
