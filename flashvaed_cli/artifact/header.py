"""An artifact's header: everything but the tensors.

The header is JSON under the key `flashvaed` of a safetensors file. The hash of an artifact's content (`content_sha256`
in `artifact/store.py`) leaves out when and by what command it was made, so that the same work gives the same hash.
Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, ValidationError, model_serializer

from flashvaed_cli import __version__
from flashvaed_cli.artifact.header_checks import (
    check_factors,
    check_family,
    check_groups,
    check_kept_channels,
    check_statistics,
)
from flashvaed_cli.artifact.run_record import RunRecord
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.untrusted.files import parse_json

SCHEMA_VERSION = 2
"""2: with `run`. Headers without it are version 1, from older versions of flashvaed."""

NO_CONTENT = ("run", "command_line", "schema_version", "tool")
"""Fields that the content hash leaves out."""


def _json_value(value: object) -> Any:
    """JSON values only, tuples as lists; non-finite figures become null, because JSON cannot express them."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"keys must be strings, not {[key for key in value if not isinstance(key, str)][:3]}")
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise ValueError(f"{type(value).__name__} is not a JSON value: {value!r:.60}")


JsonDict = Annotated[dict[str, Any], BeforeValidator(_json_value)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lineage(_Frozen):
    """Another file that this one came from, in the `role` of `original`, `decoder` or `analysis`.

    `weights`: which of several sets of weights in it was read, as the user named it; None: the first.
    """

    role: str
    location: str
    sha256: str
    weights: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent_choice(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Keep artifacts made from files with one set of weights readable for versions that know nothing else."""
        fields = handler(self)
        return fields if self.weights is not None else {name: fields[name] for name in fields if name != "weights"}


class ArtifactHeader(_Frozen):
    """The header of one artifact.

    Attributes:
        tool: version of flashvaed that wrote it.
        latent_mean: per latent channel, so that normalized = (raw - latent_mean) / latent_std.
        kept_channels: tensor address, `up2.0` (a block's output) or `up2.0.conv1` (a layer's), to the indices of
            the kept channels of the original. An absent address keeps them all.
        recipe: the resolved settings of the command that wrote it.
        original: what the pipeline started from; None when this is itself an original.
        parents: the files that the command read.
        measured: figures, by name; non-finite ones are stored as null.
        run: who made it, when and on what.
    """

    schema_version: int = 1
    tool: str = __version__
    kind: Literal["vae", "decoder", "analysis"]
    family: str
    decoder: DecoderSpec | None = None
    encoder: EncoderSpec | None = None
    latent_mean: tuple[FiniteFloat, ...]
    latent_std: tuple[FiniteFloat, ...]
    kept_channels: dict[str, tuple[int, ...]] = {}
    recipe: JsonDict = {}
    command_line: str = ""
    seed: int | None = None
    original: Lineage | None = None
    parents: tuple[Lineage, ...] = ()
    measured: JsonDict = {}
    run: RunRecord | None = None


def dump_header(header: ArtifactHeader) -> str:
    """The header as JSON; equal headers give equal text."""
    # Not pydantic's JSON mode, which fails on file names that are not UTF-8; JSON can express them (as `\\udce9`).
    fields = header.model_dump()
    if header.run is None:
        del fields["run"]
    else:
        fields["schema_version"] = SCHEMA_VERSION
    return canonical_json(fields)


def canonical_json(value: Mapping[str, Any]) -> str:
    """Equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_header(text: str, location: str) -> ArtifactHeader:
    """The header of the artifact at `location`.

    Raises:
        ArtifactError: written by a newer flashvaed, damaged, or with inconsistent values (named).
    """
    try:
        raw = parse_json(text)
        version = raw["schema_version"]
    except (ValueError, TypeError, KeyError):
        raise ArtifactError(f"{location}: its flashvaed header is damaged; make the artifact again.") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{location}: written by flashvaed {raw.get('tool', '?')} with artifact schema {version}; "
            f"this is flashvaed {__version__}, which reads schemas up to {SCHEMA_VERSION}. Upgrade flashvaed."
        )
    try:
        header = ArtifactHeader.model_validate(raw)
        _check_values(header)
        return header
    except ValidationError as error:
        faults = "; ".join(map(_fault, error.errors(include_url=False)[:4]))
    except ValueError as error:
        faults = str(error)
    raise ArtifactError(
        f"{location}: its flashvaed header does not fit schema {version} ({faults}); make the artifact again."
    )


def _check_values(header: ArtifactHeader) -> None:
    """Raise ValueError unless the values are consistent."""
    coders = [spec for spec in (header.decoder, header.encoder) if spec is not None]
    check_family(header.family, coders)
    check_statistics(header.latent_mean, header.latent_std, coders)
    for spec in coders:
        check_factors(spec)
        check_groups(spec)
    check_kept_channels(header.kept_channels, header.decoder)


def _fault(fault: Mapping[str, Any]) -> str:
    place = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], BaseModel | dict | list | tuple) else f", not {fault['input']!r:.60}"
    return f"{place}: {message}{given}" if place else message
