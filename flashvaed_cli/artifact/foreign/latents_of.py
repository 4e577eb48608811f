"""Whose latents a light decoder of another project reads: its file does not say, so shapes and the user do."""

from __future__ import annotations

from collections.abc import Callable

from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.registry import FAMILIES, families_named


def family_of_latents(kind: str, shape: str, name: str | None, fits: Callable[[Family], bool], location: str) -> Family:
    """The family that is named, or the only one that fits.

    Args:
        kind: what such a decoder is called, and `shape` what its tensors tell of the latents; for messages.
        name: what the user says.
        fits: whether the latents of a family have that shape.
    Raises:
        ArtifactError: the one that is named does not fit, or several or none do.
    """
    fitting = [one for one in FAMILIES.values() if fits(one)]
    listed = ", ".join(one.name for one in fitting) or "none that this version knows"
    asked = fitting if name is None else [FAMILIES[one] for one in families_named(name) if FAMILIES[one] in fitting]
    if name is not None and not asked:
        raise ArtifactError(f"{location}: a {kind} for {shape}, which those of {name} are not; it fits {listed}.")
    if len(asked) != 1:
        raise ArtifactError(
            f"{location}: a {kind}, and its file does not say whose latents it decodes. Name the family with --family; "
            f"by its shapes it fits {listed}."
        )
    return asked[0]
