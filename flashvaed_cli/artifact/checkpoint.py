"""Checkpoints of any origin as modules, and modules back into artifacts.

A location is the path of an artifact, of another program's file or diffusers folder, `hf://owner/repo/path`, or
`builtin:NAME`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.coders import (
    as_roles,
    coders_from_foreign,
    empty_coder,
    fill_coder,
    named_tensors,
    shapes_of,
)
from flashvaed_cli.artifact.foreign.configuration import check_keys, check_widths, configuration, latent_statistics
from flashvaed_cli.artifact.foreign.flash_folder import FLASH_CLASS, flash_coders, flash_header
from flashvaed_cli.artifact.foreign.mismatch import compare_shapes
from flashvaed_cli.artifact.foreign.recognition import recognise, twins
from flashvaed_cli.artifact.foreign.taehv import TAEHV, Statistics, is_taehv, taehv_decoder
from flashvaed_cli.artifact.foreign.taesd import TAESD, is_taesd, taesd_decoder
from flashvaed_cli.artifact.foreign.weights import ForeignWeights, checkpoint_files, read_foreign
from flashvaed_cli.artifact.header import ArtifactHeader, Lineage
from flashvaed_cli.artifact.hub import SCHEME, fetch_hub_file
from flashvaed_cli.artifact.run_record import RunRecord
from flashvaed_cli.artifact.store import content_sha256, read_artifact, sha256_of_files, write_artifact
from flashvaed_cli.artifact.weight_checks import require_usable_weights
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Role
from flashvaed_cli.families.registry import families_named, get_family
from flashvaed_cli.limits import MAX_LISTED_MISTAKES, MAX_QUOTED_CHARS
from flashvaed_cli.ownership import has_own_header
from flashvaed_cli.paths import user_path
from flashvaed_cli.untrusted.files import unchanging

BUILTIN_SCHEME = "builtin:"
ARTIFACT_LAYOUT = "flashvaed"
StatisticsOf = Callable[[Family], Statistics]
FAMILY_KEY = "flashvaed.family"
"""The metadata key that names the family in files that `export` writes in another layout."""
_NO_STATISTICS = "no latent statistics (per_channel_statistics.*, or latents_mean and latents_std)"


@dataclass(frozen=True)
class Checkpoint:
    """A VAE, or half of one, ready to run: float32, eval mode, no gradients.

    Attributes:
        location: as given.
        sha256: of the file (for a folder, of the list of files; for an artifact, of its content).
        layout: `flashvaed` for an artifact, else the name of the layout that its tensors are in.
        latent_mean: per latent channel, so that normalized = (raw - latent_mean) / latent_std; both are empty where
            nothing tells them.
        kept_channels: see `ArtifactHeader`; empty for foreign checkpoints.
        header: None for foreign checkpoints.
        twins: other families that it may be of as well, with the same frames; empty where the user, a configuration
            or the names tell.
        notes: what was missing or ignored, a line each.
        weights: the user's word for which of several sets in the file was read.
    """

    location: str
    sha256: str
    layout: str
    family: str
    decoder: Decoder | None
    encoder: Encoder | None
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    kept_channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    header: ArtifactHeader | None = None
    twins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str | None = None

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        coder = self.encoder if self.decoder is None else self.decoder
        assert coder is not None
        return coder.spec.latent_width

    def require_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per latent channel. Raises ArtifactError if they are unknown."""
        if not self.latent_mean or not self.latent_std:
            raise ArtifactError(
                f"{self.location}: {_NO_STATISTICS}, which normalized latents need to become raw. Give raw "
                "latents (--latent-scale raw), or a checkpoint that has them: a diffusers folder, LTX's own file, or "
                "latents_mean and latents_std in the metadata of the safetensors file."
            )
        return self.latent_mean, self.latent_std

    def require_decoder(self) -> Decoder:
        """The decoder. Raises ArtifactError if there is none."""
        if self.decoder is None:
            raise ArtifactError(f"{self.location}: holds an encoder but no decoder.")
        return self.decoder

    def require_encoder(self) -> Encoder:
        """The encoder. Raises ArtifactError if there is none."""
        if self.encoder is None:
            raise ArtifactError(
                f"{self.location}: holds a decoder but no encoder, which is needed to turn videos into latents. "
                "Give the VAE that it was made for with --original."
            )
        return self.encoder

    @property
    def own_encoder(self) -> Encoder | None:
        """An encoder that was made together with the decoder, not the original's."""
        return self.encoder if self.header is not None and self.header.original is not None else None

    def lineage(self, role: str) -> Lineage:
        """How other artifacts refer to this one."""
        return Lineage(role=role, location=self.location, sha256=self.sha256, weights=self.weights)


def load_checkpoint(
    location: str | Path,
    *,
    builtins: Mapping[str, Path],
    family: str | None = None,
    weights: str | None = None,
    original: str | None = None,
) -> Checkpoint:
    """Load a checkpoint from any location; the width is read from the shapes.

    Args:
        builtins: what `builtin:NAME` stands for.
        family: of the checkpoint, or `ltx` or `ltx-video`, all of its versions, where its names leave that open;
            None: detected from names and config.
        weights: which of several sets of weights in the file: `ema`, or the file's own word; None: the first.
        original: where a light decoder of another project finds the statistics of its latents, if its family's are in
            that one's files only.
    Raises:
        ArtifactError: not found, not readable, of another model or family, or tensors that do not fit.
        SpecError: an unknown family.
    """
    location = str(location)
    statistics_of = partial(_statistics_of, location, original, builtins)
    path = locate(location, builtins)
    with unchanging(path):
        return _load_located(location, path, family, weights, statistics_of)


def _statistics_of(location: str, original: str | None, builtins: Mapping[str, Path], family: Family) -> Statistics:
    """Those of a family's latents, from a file of its own."""
    if original is None:
        raise ArtifactError(
            f"{location}: takes normalized latents, and the statistics of those of {family.name} are in that model's "
            "own files only. Give one with --original; where a command has no such option, give it what convert-ops "
            "makes of both (--profile exact)."
        )
    return _load_located(original, locate(original, builtins), family.name, None).require_statistics()


def _usable(checkpoint: Checkpoint) -> Checkpoint:
    for coder in (checkpoint.decoder, checkpoint.encoder):
        if coder is not None:
            require_usable_weights(coder, checkpoint.location)
    return checkpoint


def _load_located(
    location: str, path: Path, family: str | None, weights: str | None, statistics_of: StatisticsOf | None = None
) -> Checkpoint:
    if not has_own_header(path):
        foreign = read_foreign(path, weights)
        return _usable(replace(_from_weights(location, foreign, family, statistics_of), weights=weights))
    if weights is not None:
        raise ArtifactError(
            f"{location}: a flashvaed artifact, which has only one set of weights. Leave --weights out."
        )
    checkpoint = _usable(_load_artifact(location, path))
    if family is not None and checkpoint.family not in families_named(family):
        raise ArtifactError(f"{location}: an artifact of the family {checkpoint.family}, not {family}.")
    return checkpoint


def locate(location: str, builtins: Mapping[str, Path], *, may_download: bool = True) -> Path:
    """The file or folder that a location refers to, downloaded if needed and allowed, or from the Hub's cache.

    Raises:
        ArtifactError: nothing there; says what is there instead.
    """
    if location.startswith(SCHEME):
        return fetch_hub_file(location, only_cached=not may_download)
    listed = ", ".join(f"{BUILTIN_SCHEME}{name}" for name in builtins) or "none"
    if location.startswith(BUILTIN_SCHEME):
        name = location.removeprefix(BUILTIN_SCHEME)
        if name not in builtins:
            raise ArtifactError(f"{location}: no such builtin; this version ships: {listed}.")
        return builtins[name]
    path = user_path(location)
    if path.exists():
        return path
    folder = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()] if folder.is_dir() else [], n=3)
    hint = f" Near it: {', '.join(str(folder / name) for name in near)}." if near else ""
    raise ArtifactError(f"{location}: no such file or folder.{hint} Builtin: {listed}.")


def _load_artifact(location: str, path: Path) -> Checkpoint:
    header, tensors = read_artifact(path)
    if header.kind == "analysis":
        raise ArtifactError(f"{location}: an analysis (statistics), not a decoder. Give it with --analysis.")
    specs: dict[Role, CoderSpec | None] = {"decoder": header.decoder, "encoder": header.encoder}
    coders: dict[Role, Coder] = {role: empty_coder(spec) for role, spec in specs.items() if spec is not None}
    expected = {
        f"{role}.{name}": tuple(value.shape) for role, coder in coders.items() for name, value in named_tensors(coder)
    }
    compare_shapes(expected, shapes_of(tensors)).raise_if_any(location, ARTIFACT_LAYOUT)
    for role, coder in coders.items():
        fill_coder(coder, {name: tensors[f"{role}.{name}"] for name, _ in named_tensors(coder)}, location)
    return Checkpoint(
        location=location,
        sha256=content_sha256(path),
        layout=ARTIFACT_LAYOUT,
        family=header.family,
        **as_roles(coders),
        latent_mean=header.latent_mean,
        latent_std=header.latent_std,
        kept_channels=dict(header.kept_channels),
        header=header,
    )


def in_memory_checkpoint(weights: ForeignWeights, location: str) -> Checkpoint:
    """A checkpoint from tensors and a config that another program has loaded; the SHA-256 is left empty.

    Args:
        location: what to call it in messages.
    Raises:
        ArtifactError: as `load_checkpoint` does.
    """
    return _usable(_from_weights(location, weights, None))


def _from_weights(
    location: str, weights: ForeignWeights, family: str | None, statistics_of: StatisticsOf | None = None
) -> Checkpoint:
    family = family or weights.metadata.get(FAMILY_KEY)
    config_class = (weights.config or {}).get("_class_name")
    if not isinstance(config_class, str | None):
        raise ArtifactError(
            f"{location}: _class_name in its config is {config_class!r:.60}, which is not a class name."
        )
    if config_class == FLASH_CLASS:
        return _from_flash_folder(location, weights)
    shapes = shapes_of(weights.tensors)
    if config_class is None and is_taehv(shapes):
        given = statistics_of or partial(_statistics_of, location, None, {})
        return _from_tiny(location, weights, TAEHV, *taehv_decoder(weights.tensors, family, location, given))
    if is_taesd(shapes, config_class):
        decoder, read = taesd_decoder(weights.tensors, family, location, weights.config or {})
        return _from_tiny(location, weights, TAESD, decoder, read, (read.latent_mean, read.latent_std))
    layout = recognise(shapes, location, family=family, config_class=config_class, config=weights.config)
    config = configuration(weights, get_family(layout.family), location)
    with _odd_values_named(location):
        coders = coders_from_foreign(weights.tensors, layout, location, config)
        specs: dict[Role, CoderSpec] = {role: coder.spec for role, coder in coders.items()}
        unknown = check_keys(config, specs, location)
        if weights.whole_folder:
            check_widths(weights.config or {}, specs, location)
    mean, std = latent_statistics(weights, get_family(layout.family), specs, location)
    notes = [] if weights.note is None else [weights.note]
    notes += [] if mean else [f"{_NO_STATISTICS}: only raw latents can be read"]
    notes += [note for spec in specs.values() if (note := get_family(layout.family).config_keys.assumed(spec, config))]
    if unknown:
        listed = ", ".join(key[:MAX_QUOTED_CHARS] for key in unknown[:MAX_LISTED_MISTAKES])
        more = f" and {len(unknown) - MAX_LISTED_MISTAKES} more" if len(unknown) > MAX_LISTED_MISTAKES else ""
        notes.append(f"unknown keys of its configuration, which are ignored: {listed}{more}")
    return Checkpoint(
        location=location,
        sha256=_sha256(weights),
        layout=layout.name,
        family=layout.family,
        **as_roles(coders),
        latent_mean=mean,
        latent_std=std,
        twins=() if family or config_class else twins(layout),
        notes=tuple(notes),
    )


def _from_tiny(
    location: str, weights: ForeignWeights, layout: str, decoder: Decoder, family: Family, statistics: Statistics
) -> Checkpoint:
    """A light decoder from another project, for a family's latents."""
    has_encoder = any(name.startswith("encoder.") for name in weights.tensors)
    return Checkpoint(
        location=location,
        sha256=_sha256(weights),
        layout=layout,
        family=family.name,
        decoder=decoder,
        encoder=None,
        latent_mean=statistics[0],
        latent_std=statistics[1],
        notes=("its encoder is ignored: flashvaed encodes with the family's own",) if has_encoder else (),
    )


def _from_flash_folder(location: str, weights: ForeignWeights) -> Checkpoint:
    config = weights.config or {}
    header = flash_header(config, location)
    with _odd_values_named(location):
        decoder, encoder = flash_coders(weights.tensors, config, header, location)
    return Checkpoint(
        location=location,
        sha256=_sha256(weights),
        layout=FLASH_CLASS,
        family=header.family,
        decoder=decoder,
        encoder=encoder,
        latent_mean=header.latent_mean,
        latent_std=header.latent_std,
        kept_channels=dict(header.kept_channels),
        header=header,
    )


def _sha256(weights: ForeignWeights) -> str:
    return sha256_of_files(weights.files) if weights.files else ""


@contextmanager
def _odd_values_named(location: str) -> Iterator[None]:
    """Config values of a type that no program writes are the file's fault, not ours."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise ArtifactError(
            f"{location}: its config or tensors hold a value that cannot be understood "
            f"({type(error).__name__}: {error!s:.200}). Download it again, or give the weights file alone."
        ) from error


def derived_header(
    parent: Checkpoint,
    *,
    kind: Literal["vae", "decoder", "analysis"] = "decoder",
    recipe: Mapping[str, Any] | None = None,
    command_line: str = "",
    seed: int | None = None,
    kept_channels: Mapping[str, Sequence[int]] | None = None,
    parents: Sequence[Lineage] = (),
    measured: Mapping[str, Any] | None = None,
    run: RunRecord | None = None,
) -> ArtifactHeader:
    """The header of what a command makes from `parent`: family, scales and lineage are passed on.

    Args:
        kept_channels: of the new decoder; None passes on the parent's.
        parents: further files that the command read (an analysis); `parent` itself is put first.
    """
    original = parent.header.original if parent.header is not None else None
    kept = parent.kept_channels if kept_channels is None else kept_channels
    return ArtifactHeader(
        kind=kind,
        family=parent.family,
        decoder=None if parent.decoder is None else parent.decoder.spec,
        latent_mean=parent.latent_mean,
        latent_std=parent.latent_std,
        kept_channels={address: tuple(indices) for address, indices in kept.items()},
        recipe=dict(recipe or {}),
        command_line=command_line,
        seed=seed,
        original=original or parent.lineage("original"),
        parents=(parent.lineage("decoder"), *parents),
        measured=dict(measured or {}),
        run=run,
    )


def save_checkpoint(
    path: str | Path,
    header: ArtifactHeader,
    *,
    decoder: Decoder | None,
    encoder: Encoder | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> str:
    """Write a decoder, or with an encoder a whole VAE, as an artifact. Returns the SHA-256 of its content.

    The header's kind and specs come from the modules.

    Raises:
        ArtifactError: a weight does not fit `dtype`, or see `write_artifact`.
    """
    tensors: dict[str, Tensor] = {}
    for role, coder in (("decoder", decoder), ("encoder", encoder)):
        for name, tensor in () if coder is None else named_tensors(coder):
            tensors[f"{role}.{name}"] = cast_weight(tensor, dtype, f"{role}.{name}")
    specs = {
        "kind": "decoder" if encoder is None else "vae",
        "decoder": None if decoder is None else decoder.spec,
        "encoder": None if encoder is None else encoder.spec,
    }
    write_artifact(path, tensors, header.model_copy(update=specs), force=force)
    return content_sha256(path)


def cast_weight(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight in the dtype of the file. Raises ArtifactError if it overflows there or is not finite."""
    cast_tensor = tensor.detach().to("cpu", dtype)
    if not torch.isfinite(cast_tensor).all():
        what = (
            "is not finite" if not torch.isfinite(tensor).all() else f"overflows in {dtype}: write float32 or bfloat16"
        )
        raise ArtifactError(f"nothing was written: weight {name} {what}.")
    return cast_tensor


def load_verified(location: str, checkpoint: Checkpoint, recorded: Lineage | None, path: Path) -> Checkpoint:
    """Load an original at a path once its hash matches the record; no other file is parsed.

    Args:
        location: what to call it in messages.
        checkpoint: the one that descends from it.
        recorded: what `checkpoint` says of its original; None: nothing is compared.
    Raises:
        ArtifactError: another file than recorded, or see `load_checkpoint`.
    """
    weights = None if recorded is None else recorded.weights
    if recorded is not None:
        found = sha256_of_files(checkpoint_files(path, weights))
        if found != recorded.sha256:
            raise ArtifactError(
                f"{location} is not the original of {checkpoint.location}: expected SHA-256 {recorded.sha256:.64} "
                f"(recorded for {recorded.location}), found {found}. Give the right file with --original."
            )
    return _load_located(location, path, checkpoint.family, weights)
