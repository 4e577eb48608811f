"""What is shipped and what it needs: the wheel in an environment of its own, and the lists of dependencies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flashvaed_cli import __version__
from flashvaed_cli.recipe import shipped_recipes
from tests.conftest import REPOSITORY
from tests.supply.__main__ import LICENCES, LOCK, LOWEST, lowest, needed, optional, project

LISTED = re.compile(r"\| (?P<name>[\w.-]+) \| (?P<licence>.+) \|")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (found,) = folder.iterdir()
    return found


def shipped() -> dict[str, Path]:
    """Where the files of the package and the recipes lie in the wheel, by what this clone has."""
    package, recipes = REPOSITORY / "flashvaed_cli", REPOSITORY / "recipes"
    files = {f"flashvaed_cli/{path.relative_to(package).as_posix()}": path for path in package.rglob("*")}
    files |= {f"flashvaed_cli/recipe/shipped/{path.name}": path for path in recipes.iterdir()}
    return {name: path for name, path in files.items() if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"flashvaed-{__version__}.dist-info"
        held = {name for name in archive.namelist() if not name.startswith(f"{info}/")}
        assert held == set(shipped())
        for name, path in shipped().items():
            assert archive.read(name) == path.read_bytes(), name
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        metadata = BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [Requirement(text) for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    stated, wanted = ({canonicalize_name(one.name): one.specifier for one in some} for some in (always, needed()))
    assert stated == wanted


def test_the_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Alone in its environment; what it depends on is found in this one, which knows the clone by a .pth file only."""
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", str(clean)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(clean / "bin" / "python"), *install], check=True)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "COLUMNS": "80"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(clean / "bin" / command[0]), *command[1:]],
            check=True,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    place = Path(run("python", "-c", "import flashvaed_cli; print(flashvaed_cli.__file__)").strip())
    assert clean in place.parents
    assert run("flashvaed", "--version") == f"flashvaed {__version__}\n"
    assert "Turn the decoder of a video VAE into a fast drop-in decoder" in run("flashvaed", "--help")
    listed = run("flashvaed", "recipes")
    assert all(name in listed for name in shipped_recipes())
    assert "builtin:tiny-wan" in run("flashvaed", "info", "builtin:tiny-wan")


def test_lowest_versions_are_those_of_the_project() -> None:
    assert LOWEST.read_text(encoding="utf-8") == lowest(), "python -m tests.supply lowest"


def test_the_lock_satisfies_the_project() -> None:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert list(locked) == sorted(locked)
    for one in needed():
        assert one.specifier.contains(locked[canonicalize_name(one.name)]), one


def test_every_direct_dependency_has_a_licence() -> None:
    listed = dict(LISTED.findall(LICENCES.read_text(encoding="utf-8")))
    heads = {"needed", "only"}  # of the two tables
    named = {canonicalize_name(one.name) for one in (*needed(), *optional())}
    assert {name for name in listed if name not in heads} == named, "python -m tests.supply licences"
    assert not [name for name, licence in listed.items() if not licence.strip() or licence == "UNKNOWN"]
    assert project()["license"] == "Apache-2.0"
