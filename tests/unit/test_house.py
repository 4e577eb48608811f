"""The house keeps its order: rules that a newcomer relies on, checked on the tree as it is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import flashvaed_cli
from flashvaed_cli import families
from flashvaed_cli.decoders.modules.blocks import BLOCKS
from flashvaed_cli.decoders.modules.operators import OPERATORS, Conv
from flashvaed_cli.decoders.spec.blocks import KINDS
from flashvaed_cli.decoders.spec.operators import OPERATOR_FACTS, Operator
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import FAMILIES, LAYOUTS, class_layout
from flashvaed_cli.surgery.layer_fit import OPERATOR_FITS
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


GUIDE = PACKAGE / "README.md"
READMES = [ROOT / "README.md", GUIDE, *(ROOT / name / "README.md" for name in ("recipes", "tests", "tests/bench"))]
in_a_checkout = pytest.mark.skipif(
    not all(path.is_file() for path in READMES), reason="the package is installed without its documents"
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")


def links_of(text: str) -> list[str]:
    """The targets of links, without those to other sites and to headings of the same file."""
    targets = [target.partition("#")[0] for target in LINK.findall(FENCE.sub("", text)) if "://" not in target]
    return [target for target in targets if target]


def paths_of(text: str) -> list[str]:
    """Paths in code spans outside links, and folders and modules that a block without a language lists."""
    spans = re.findall(r"`([\w./-]+)`", LINK.sub("", FENCE.sub("", text)))
    blocks = "\n".join(body for _, language, body in FENCE.findall(text) if not language)
    listed = re.findall(r"(?:^|  )(\w[\w/]*(?:/|\.py))(?= |$)", blocks, re.MULTILINE)
    inside = [path for path in spans if not path.startswith("/")]  # what begins with a slash is the machine's
    return [path for path in inside if "/" in path or path.endswith(".py")] + listed


def is_in_tree(path: str, readme: Path) -> bool:
    """Whether a path is there from any of the folders that paths are read from; NAME stands for any name."""
    if "/" not in path:
        return any(True for top in (PACKAGE, ROOT / "tests") for _ in top.rglob(path))
    pattern = path.rstrip("/").replace("NAME", "*")
    return any(True for top in (readme.parent, ROOT, PACKAGE, ROOT / "tests") for _ in top.glob(pattern))


@in_a_checkout
@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_in_a_readme_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    missing = [link for link in links_of(text) if not (readme.parent / link).exists()]
    missing += [path for path in paths_of(text) if not is_in_tree(path, readme)]
    assert not missing, f"{readme.relative_to(ROOT)} names what is not in the tree: {', '.join(missing)}"


@in_a_checkout
def test_every_identifier_in_the_guide_exists() -> None:
    spans = set(re.findall(r"`(\w+)`", FENCE.sub("", GUIDE.read_text(encoding="utf-8"))))
    named = {name for name in spans if "_" in name or name != name.lower()}
    words = {word for module in MODULES for word in re.findall(r"\w+", module.read_text(encoding="utf-8"))}
    assert len(named) > 10
    assert not named - words, f"the guide names what no module has: {', '.join(sorted(named - words))}"


@in_a_checkout
def test_the_guide_lists_every_room_at_its_level() -> None:
    """Levels are divided by blank lines; in the last group each line is one."""
    rooms = GUIDE.read_text(encoding="utf-8").partition("## Rooms")[2].partition("```\n")[2].partition("```")[0]
    *levels, lowest = rooms.split("\n\n")
    levels += lowest.splitlines()
    listed = [set(re.findall(r"(?:^|  )(\w+)(?:/|\.py)", level, re.MULTILINE)) for level in levels]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(one["layers"] for one in settings["contracts"] if one.get("containers") == ["flashvaed_cli"])
    assert listed == [set(re.findall(r"\w+", layer)) for layer in layers if layer != "__main__"]


def test_every_family_folder_is_registered() -> None:
    folders = [one.name for one in pkgutil.iter_modules(families.__path__) if one.ispkg]
    found = [importlib.import_module(f"flashvaed_cli.families.{name}") for name in folders]
    assert {family.name for folder in found for family in folder.FAMILIES} == set(FAMILIES)
    assert {layout.name for folder in found for layout in folder.LAYOUTS} == set(LAYOUTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_files_of_its_own_and_a_class_in_diffusers(name: str) -> None:
    """Or it says that diffusers has none."""
    own = [layout for layout in LAYOUTS.values() if layout.family == name and layout.config_class is None]
    assert own, f"{name} has no layout without config_class: the names in its own files"
    layout, obstacle = class_layout(name), str(FAMILIES[name].native_obstacle)
    assert layout is not None or "no class" in obstacle, (
        f"{name} has no layout with config_class; if diffusers has no class for it, native_obstacle says so: "
        f"'diffusers has no class for ...'"
    )
    assert layout is None or layout.arguments, f"{layout.name} names no arguments of {layout.config_class}"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_every_layout_has_a_place_for_every_block(layout: Layout) -> None:
    family = FAMILIES[layout.family]
    for role, places in layout.places.items():
        build = family.decoder_spec if role == "decoder" else family.encoder_spec
        blocks = dict(build(family.released_base_width, family.latent_width).blocks())
        lacking = sorted(set(blocks) - set(places))
        assert not lacking, f"places of the {role} in {layout.name}: none for {', '.join(lacking)}"
        for address, block in blocks.items():
            named, wanted = set(layout.layers.get(block.kind, ())), {*block.layers, *block.norms}
            lacking = [] if block.has_path_names else sorted(wanted - named)
            assert not lacking, f"layers of {block.kind} in {layout.name}: no name for {', '.join(lacking)} ({address})"


UNSOLVED = {"strided_downsample", "unshuffle_downsample", "cell_downsample"}
"""Of encoders that no command refits: LTX's are native at the release's width only, HunyuanVideo 1.5's never."""

TABLES = {
    "modules (decoders/modules/blocks.py)": set(BLOCKS),
    "narrowing (surgery/respec.py)": set(NARROWED),
    "weights from the reference (surgery/transfer.py)": set(TRANSFERS),
    "least squares (surgery/solvers/table.py)": set(BLOCK_SOLVERS) | UNSOLVED,
}


def test_every_table_has_every_kind_of_block() -> None:
    """What a new kind of block still lacks, in one message."""
    lacking = {table: sorted(set(KINDS) - kinds) for table, kinds in TABLES.items() if set(KINDS) - kinds}
    assert not lacking, f"these tables lack kinds of block: {lacking}"
    strange = {table: sorted(kinds - set(KINDS)) for table, kinds in TABLES.items() if kinds - set(KINDS)}
    assert not strange, f"these tables have kinds that decoders/spec/blocks.py lacks: {strange}"


NEVER_FITTED = {"depthwise3d"}
"""Operators with weights of their own whose layers keep them: the fitted layers around them make up for it."""


def test_every_table_has_every_operator() -> None:
    """What a new operator still lacks, in one message."""
    names = set(get_args(Operator))
    own_weights = {name for name, built in OPERATORS.items() if overrides_dense_kernel(built)}
    lacking = {
        "facts (decoders/spec/operators.py: OPERATOR_FACTS)": names - set(OPERATOR_FACTS),
        "modules (decoders/modules/operators.py: OPERATORS)": names - set(OPERATORS),
        "least squares (surgery/layer_fit.py: OPERATOR_FITS)": own_weights - set(OPERATOR_FITS) - NEVER_FITTED,
    }
    lacking = {table: sorted(operators) for table, operators in lacking.items() if operators}
    assert not lacking, f"these tables lack operators: {lacking}"
    assert set(OPERATORS) | set(OPERATOR_FACTS) | set(OPERATOR_FITS) == names


def overrides_dense_kernel(built: object) -> bool:
    """Whether a module's weights are not a dense kernel themselves."""
    return isinstance(built, type) and issubclass(built, Conv) and built.dense_kernel is not Conv.dense_kernel


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
