"""One error for all differences between the tensors expected and those found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError
from torch import Tensor

from flashvaed_cli.errors import ArtifactError

_SHOWN = 8
_LONGEST = 160  # characters of one name with its shapes

Shape = tuple[int, ...]


def require_float(name: str, tensor: Tensor, location: str) -> None:
    """Raise ArtifactError if a tensor, of this name in the file, is no float."""
    if not tensor.is_floating_point():
        raise ArtifactError(
            f"{location}: {name} is {tensor.dtype}; quantised weights cannot be read. Give a float checkpoint."
        )


@dataclass
class Mismatch:
    """Tensors that do not fit, by name; in `wrong` with the shapes expected and found."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def raise_if_any(self, location: str, layout: str) -> None:
        """Raise one ArtifactError with the count of each kind and at most eight names."""
        parts = [
            _listed("missing", self.missing),
            _listed("unexpected", self.unexpected),
            _listed("of another shape", self.wrong),
        ]
        if any(parts):
            raise ArtifactError(
                f"{location}: its tensors do not fit the {layout} layout.\n"
                + "\n".join(part for part in parts if part)
                + "\nThe file is incomplete, or of another model; nothing was loaded."
            )


def compare_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], allowed: Iterable[str] = ()) -> Mismatch:
    """Compare by name and by shape, ignoring axes of length 1. `allowed`: names that may be superfluous."""
    allowed = set(allowed)
    return Mismatch(
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected and name not in allowed],
        wrong=[
            f"{name} (expected {list(shape)}, found {list(found[name])})"
            for name, shape in expected.items()
            if name in found and without_singletons(shape) != without_singletons(found[name])
        ],
    )


def without_singletons(shape: Shape) -> Shape:
    """The shape without axes of length 1, which layouts add and leave out at will."""
    return tuple(length for length in shape if length != 1)


def reasons(error: ValidationError) -> str:
    """The faults that a spec found, without pydantic's own text."""
    return "; ".join(
        "a stage without a block" if fault["type"] == "too_short" else fault["msg"].removeprefix("Value error, ")
        for fault in error.errors()
    )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} {what}: {', '.join(name[:_LONGEST] for name in names[:_SHOWN])}{more}"
