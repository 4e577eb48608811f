"""The house keeps its order: rules that a newcomer relies on, checked on the tree as it is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import get_args

import pytest

import flashvaed_cli
from flashvaed_cli import families
from flashvaed_cli.decoders.modules.blocks import BLOCKS
from flashvaed_cli.decoders.modules.operators import OPERATORS
from flashvaed_cli.decoders.spec.blocks import KINDS
from flashvaed_cli.decoders.spec.operators import OPERATOR_FACTS, Operator
from flashvaed_cli.families.registry import FAMILIES, LAYOUTS, class_layout, original_layout
from flashvaed_cli.surgery.respec import NARROWED
from flashvaed_cli.surgery.solvers.table import BLOCK_SOLVERS
from flashvaed_cli.surgery.transfer import TRANSFERS

PACKAGE = Path(flashvaed_cli.__file__).parent
ROOT = PACKAGE.parent
MOST_FILES = 16
MOST_README_LINES = 150
FOLDERS = sorted(path for path in [PACKAGE, *PACKAGE.rglob("*")] if path.is_dir() and any(path.glob("*.py")))
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_folder_says_what_it_is_for(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the package is installed without its README")
def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_every_family_folder_is_registered() -> None:
    folders = [one.name for one in pkgutil.iter_modules(families.__path__) if one.ispkg]
    found = [importlib.import_module(f"flashvaed_cli.families.{name}") for name in folders]
    assert {family.name for folder in found for family in folder.FAMILIES} == set(FAMILIES)
    assert {layout.name for folder in found for layout in folder.LAYOUTS} == set(LAYOUTS)


CLASSLESS = {"leanvae"}
"""Families that diffusers has no class for."""


@pytest.mark.parametrize("name", CLASSLESS)
def test_a_family_without_a_class_says_so(name: str) -> None:
    assert original_layout(name).family == name
    assert class_layout(name) is None
    assert "no class" in str(FAMILIES[name].native_obstacle)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - CLASSLESS))
def test_every_family_has_files_of_its_own_and_a_class_in_diffusers(name: str) -> None:
    assert original_layout(name).family == name
    layout = class_layout(name)
    assert layout is not None
    assert layout.arguments


UNSOLVED = {"strided_downsample", "unshuffle_downsample"}
"""Of LTX's encoders, which no command refits: they are native at the release's width only."""

TABLES = {
    "modules (decoders/modules/blocks.py)": set(BLOCKS),
    "narrowing (surgery/respec.py)": set(NARROWED),
    "weights from the reference (surgery/transfer.py)": set(TRANSFERS),
    "least squares (surgery/solvers/table.py)": set(BLOCK_SOLVERS) | UNSOLVED,
}


def test_every_table_has_every_kind_of_block() -> None:
    """What a new kind of block still lacks, in one message."""
    lacking = {table: sorted(set(KINDS) - kinds) for table, kinds in TABLES.items() if set(KINDS) - kinds}
    assert not lacking
    strange = {table: sorted(kinds - set(KINDS)) for table, kinds in TABLES.items() if kinds - set(KINDS)}
    assert not strange


def test_every_operator_has_its_facts_and_a_module() -> None:
    assert set(OPERATORS) == set(OPERATOR_FACTS) == set(get_args(Operator))


def named_families(module: Path) -> set[str]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    docstrings = {
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    }
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return (texts - docstrings) & set(FAMILIES)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_knows_a_family_by_name(module: Path) -> None:
    if PACKAGE / "families" not in module.parents:
        assert named_families(module) == set()
