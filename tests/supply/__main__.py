"""What flashvaed is made of: `python -m tests.supply lowest|lock|licences` writes one of the lists beside this file.

lowest      lowest.txt: the lowest versions that pyproject.toml allows, as constraints for pip
lock        lock.txt: the versions of all that this environment's flashvaed needs, for the same ones again
licences    licences.md: the licences of what pyproject.toml names, by their packages' own metadata
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent / "pyproject.toml"
LOWEST, LOCK, LICENCES = HERE / "lowest.txt", HERE / "lock.txt", HERE / "licences.md"


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]


def needed() -> list[Requirement]:
    """What every installation needs."""
    return [Requirement(text) for text in project()["dependencies"]]


def optional() -> list[Requirement]:
    """What only extras bring, each package once."""
    texts = [text for extra in project()["optional-dependencies"].values() for text in extra]
    found = {canonicalize_name(one.name): one for one in map(Requirement, texts)}
    return [found[name] for name in sorted(found)]


def lowest() -> str:
    """Constraints for pip; every dependency states the lowest version that it works with."""
    lines = ["# python -m tests.supply lowest"]
    for one in needed():
        (bound,) = [specifier for specifier in one.specifier if specifier.operator == ">="]
        lines.append(f"{one.name}=={bound.version}")
    return "\n".join(lines) + "\n"


def lock() -> str:
    """The installed version of everything that is needed, directly or not."""
    waiting, versions = needed(), dict[str, str]()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in versions or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        found = distribution(one.name)
        versions[name] = found.version.partition("+")[0]
        extras = ["", *one.extras]
        for text in found.requires or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(Requirement(text.partition(";")[0]))
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [f"# python -m tests.supply lock, with Python {python} on {sys.platform}"]
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in sorted(versions.items()))]) + "\n"


def licences() -> str:
    """A table of the licences of direct dependencies."""
    lines = [
        "Licences of what flashvaed depends on, as the packages state them: `python -m tests.supply licences`.",
        "",
    ]
    for title, requirements in (("needed", needed()), ("only in extras", optional())):
        lines += [f"| {title} | licence |", "|---|---|"]
        lines += [f"| {canonicalize_name(one.name)} | {_licence(one.name)} |" for one in requirements]
        lines.append("")
    return "\n".join(lines)


def _licence(name: str) -> str:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here: make the environment with its extras first") from None
    return licence_of(found)


def licence_of(found: Distribution) -> str:
    """The expression of a package's metadata, else its classifiers, else the first line of its text."""

    def stated(field: str) -> list[str]:
        return [str(text).strip() for text in found.metadata.get_all(field) or ()]

    classifiers = [
        text.rpartition(" :: ")[2]
        for text in stated("Classifier")
        if text.startswith("License :: ") and text.count(" :: ") > 1
    ]
    texts = [text.partition("\n")[0] for text in stated("License")]
    return ", ".join(stated("License-Expression") or classifiers or texts).replace("|", "/")


LISTS = {"lowest": (LOWEST, lowest), "lock": (LOCK, lock), "licences": (LICENCES, licences)}


def main() -> None:
    """Write the list that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.supply", description="Write a list of dependencies.")
    parser.add_argument("list", choices=LISTS)
    path, make = LISTS[parser.parse_args().list]
    path.write_text(make(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
