"""Reading light decoders' files from other projects.

They do not say whose latents they decode: shapes and the user do. No tensor of such a file may be left over: it would
change the frames there and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError
from torch import Tensor

from flashvaed_cli.artifact.foreign.mismatch import reasons, require_float
from flashvaed_cli.artifact.header_checks import check_factors
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.registry import FAMILIES, families_named

_SHOWN = 4


class LightFile:
    """The tensors of a light decoder, taken one by one; none may be left at the end."""

    def __init__(self, kind: str, tensors: Mapping[str, Tensor], location: str) -> None:
        self.kind, self.location, self._rest = kind, location, dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor as float32.

        Args:
            shape: the expected lengths; None: any length but zero.
        Raises:
            ArtifactError: not there, of another shape, or not of a float type.
        """
        tensor = self._rest.pop(name, None)
        if tensor is None:
            raise ArtifactError(f"{self.location}: a {self.kind} without {name}: download it again.")
        fits = len(tensor.shape) == len(shape) and all(
            found > 0 if wanted is None else found == wanted for found, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if one is None else str(one) for one in shape)
            raise self.fault(f"{name} has the shape {list(tensor.shape)}, not [{wanted}]")
        require_float(name, tensor, self.location)
        return tensor.float()

    def fault(self, what: str) -> ArtifactError:
        """The error for a file with a fault, `what`."""
        return ArtifactError(f"{self.location}: not a {self.kind} that this version reads: {what}.")

    def require_empty(self) -> None:
        """Raise ArtifactError if tensors are left that no layer took."""
        if self._rest:
            more = f" and {len(self._rest) - _SHOWN} more" if len(self._rest) > _SHOWN else ""
            names = ", ".join(f"{name:.60}" for name in list(self._rest)[:_SHOWN])
            raise self.fault(f"it has no place for {names}{more}")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Report errors of a spec as faults of the file."""
        try:
            yield
        except ValidationError as error:
            raise self.fault(reasons(error)) from error
        except ValueError as error:
            raise self.fault(str(error)) from error

    def checked(self, spec: DecoderSpec) -> DecoderSpec:
        """The spec. Raises ArtifactError if tensors are left, or its layers do not enlarge latents to pixels."""
        self.require_empty()
        with self.building():
            check_factors(spec)
        return spec


def family_of_latents(kind: str, shape: str, name: str | None, fits: Callable[[Family], bool], location: str) -> Family:
    """The family that the user names, or the only one that fits.

    Args:
        kind: the decoder's kind, and `shape` the latents' shape in words; for messages.
        name: the user's choice; None: detected.
        fits: whether the latents of a family have that shape.
    Raises:
        ArtifactError: the named family does not fit, or not exactly one fits.
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
