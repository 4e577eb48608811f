"""Recipes that anybody may have written: one short message, at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.limits import MAX_MESSAGE_CHARS
from flashvaed_cli.recipe import PruneRecipe, load_recipe, resolve

_LAUGHS = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    + [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9)]
    + ["prune: {}"]
)
_MERGES = "\n".join(
    ["a0: &a0 {k0: 1, j0: 1}"]
    + [f"a{i}: &a{i}\n  <<: *a{i - 1}\n  <<: *a{i - 1}\n  k{i}: 1" for i in range(1, 40)]
    + ["prune: {}"]
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (_LAUGHS, "more than 1000 values"),
        (_MERGES, "merges one mapping only"),
        ("prune:\n  <<: [{a: 1}, {b: 2}]", "merges one mapping only"),
        ("prune: " + "[" * 500 + "]" * 500, "nested deeper"),
        ("prune: " + "{a: " * 99 + "1" + "}" * 99, "nested deeper"),
        ("prune: " + "[" * 20_000, "nested deeper"),
        ("prune: {keep_ratio: 0.5\x00}", "control character 0x00"),
        ("prune: {keep_ratio: \x1b[2J}", "control character 0x1b"),
        ("prune: !!set {a, b}", "tag"),
        ("prune: !!set {a: , b: }", "tag"),
        ("prune: !!timestamp x", "not a valid timestamp"),
        ('prune: {seed: !!int ""}', "not a valid int"),
        ("prune: {seed: !!bool x}", "not a valid bool"),
        ("prune: !!binary é", "not valid YAML"),
        ("prune: !!python/object/apply:os.system [ls]", "tag"),
        ("prune: !!omap [a: 1]", "tag"),
        ("? [a, b]\n: 1", "plain text"),
        ("\n".join(f"key{i}: {i}" for i in range(990)), "990 mistakes"),
        ("#" * 70_000, "at most 64000"),
        ("prune: {keep_ratio: " + "9" * 50_000 + "}", "not valid YAML|1 mistake"),
        ("k" * 50_000 + ": 1", "unknown key|not valid YAML"),
        ("prune: {" + "k" * 1000 + ": " + "v" * 50_000 + "}", "unknown key"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(RecipeError, match=match) as caught:
        resolve(PruneRecipe, load_recipe(path))
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARS
    assert time.monotonic() - start < 5  # 0.4 s where nothing else runs


def test_many_unknown_keys_of_a_section(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("prune: {" + ", ".join(f"key{i}: {i}" for i in range(900)) + "}")
    with pytest.raises(RecipeError, match=r"900 mistakes[\s\S]*and 888 more"):
        resolve(PruneRecipe, load_recipe(path))


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="a pipe, not a file"):
        load_recipe(tmp_path / "r.yaml")


def test_one_merge_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n- prune: &p {name: a, seed: 7}\n- prune: {<<: *p, name: b, keep_ratio: 0.5}\n")
    assert resolve(PruneRecipe, load_recipe(path), step="b").seed == 7
