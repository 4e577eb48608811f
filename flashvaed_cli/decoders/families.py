"""The families that this version knows, by name."""

from __future__ import annotations

from flashvaed_cli.decoders.family import Family
from flashvaed_cli.decoders.wan import WAN21
from flashvaed_cli.errors import SpecError

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN21,)}


def get_family(name: str) -> Family:
    """The family of that name. Raises SpecError that lists the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise SpecError(f"unknown family '{name}'; this version knows {', '.join(FAMILIES)}") from None
