"""The targets of `export` that use other programs' tensor names: the family's own file, the diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import (
    FAMILY_KEY,
    Checkpoint,
    derived_header,
    load_checkpoint,
    save_checkpoint,
)
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.artifact.original import load_original
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.variants.expansion import expanded_decoder
from flashvaed_cli.errors import ArtifactError, ExportError
from flashvaed_cli.export.checkpoint_file import READ_BACK, Reference, export_diffusers, export_safetensors, read_back
from flashvaed_cli.export.diffusers_config import diffusers_config, encoder_fault, single_file_note
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import LAYOUTS, get_family, has_family_blocks, original_layout, original_like
from flashvaed_cli.families.uniform_layout import fits_uniform_layout
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.export.flash import export_flash_folder
from flashvaed_cli.zoo.builtin import BUILTINS

DIFFUSERS_FOLDER = "diffusers"
_CHECK_GRID = (3, 6, 8)
_EXPANDED = "the low-rank time_conv layers are written as whole kernels, which save no operations"
_NOISY = "diffusers: adds noise, which this program leaves out: frames differ by that noise"


@dataclass(frozen=True)
class Prepared:
    """A checkpoint without the operators that layouts cannot hold, and the layouts of its family."""

    checkpoint: Checkpoint
    decoder: Decoder
    was_expanded: bool
    original: Layout
    diffusers: Layout | None

    @property
    def class_name(self) -> str | None:
        return None if self.diffusers is None else self.diffusers.config_class

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.checkpoint.latent_mean, self.checkpoint.latent_std

    def tensors(self, layout: Layout, encoder: Encoder | None) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The tensors of a file in the layout, and the names among them that stand for no weight."""
        coders = [coder for coder in (self.decoder, encoder) if coder is not None]
        tensors = to_program([(coder.state_dict(), coder.spec) for coder in coders], layout, self.statistics)
        return tensors, frozenset(f"{layout.prefix}{name}" for name in layout.statistics or ())

    def reference(self, seed: int, reload: Callable[[Path], Decoder] | None = None) -> Reference:
        """The reference that a file must reproduce; `reload` reads the file (None: as another program's checkpoint)."""
        return Reference(self.decoder, _check_latents(self.checkpoint, seed), reload or _reload_decoder)

    def notes(self, target: str) -> tuple[str, ...]:
        return (f"{target}: {_EXPANDED}",) if self.was_expanded else ()


def export_original_layout(checkpoint: Checkpoint, path: Path, recipe: ExportRecipe) -> ExportResult:
    """Write the family's own key layout, with the latent statistics, and the encoder if the checkpoint holds one.

    A decoder that is not made of the family's blocks has no such layout: its file is an artifact.

    Raises:
        ExportError: the file does not reproduce the decoder.
    """
    if not has_family_blocks(checkpoint.require_decoder().spec):
        return _export_artifact(checkpoint, path, recipe)
    written, encoder = prepared(checkpoint), checkpoint.encoder
    family, decoder = get_family(checkpoint.family), written.decoder
    tensors, exact = written.tensors(written.original, encoder)
    described = {key: value for one in (decoder, encoder) if one for key, value in family.described(one.spec).items()}
    statistics = dict(zip(("latents_mean", "latents_std"), written.statistics, strict=True))
    note = single_file_note(written.class_name, decoder.spec, None if encoder is None else encoder.spec)
    return export_safetensors(
        tensors,
        path,
        {
            "format": "pt",
            FAMILY_KEY: checkpoint.family,
            **{key: json.dumps(values) for key, values in statistics.items() if values},
            **({"config": json.dumps(described)} if described else {}),
        },
        reference=written.reference(recipe.seed),
        dtype=DTYPES[recipe.dtype],
        exact=exact,
        notes=(*written.notes("safetensors"), note),
    )


def _export_artifact(checkpoint: Checkpoint, path: Path, recipe: ExportRecipe) -> ExportResult:
    header = derived_header(checkpoint) if checkpoint.header is None else checkpoint.header
    decoder, dtype = checkpoint.require_decoder(), DTYPES[recipe.dtype]
    save_checkpoint(path, header, decoder=decoder, dtype=dtype)
    difference, allowed = read_back(
        Reference(decoder, _check_latents(checkpoint, recipe.seed), _reload_decoder), path, dtype, path.name
    )
    note = (
        f"safetensors: under flashvaed's own names, with its header: {checkpoint.family} has no names for a decoder of "
        "other blocks than its own"
    )
    return ExportResult("safetensors", (path,), path.stat().st_size, difference, allowed, READ_BACK, notes=(note,))


def export_diffusers_folder(checkpoint: Checkpoint, folder: Path, recipe: ExportRecipe) -> ExportResult:
    """Write a folder for `from_pretrained`, with the encoder of the checkpoint or of its original.

    It is for diffusers' own class if that can hold the decoder and there is an encoder, so that no part of the model
    lacks weights; else for `AutoencoderFlash`.

    Raises:
        ExportError: diffusers knows no such family, or the folder does not reproduce the decoder.
    """
    written = prepared(checkpoint)
    spec, layout, class_name = written.decoder.spec, written.diffusers, written.class_name
    if layout is None or class_name is None:
        raise ExportError(f"diffusers: it has no class for {checkpoint.family}")
    encoder = encoder_at_hand(checkpoint, recipe)
    uniform = fits_uniform_layout(spec, original_like(spec)).base_width is not None
    if not uniform or encoder is None or encoder_fault(class_name, spec, encoder.spec) is not None:
        reference = replace(written.reference(recipe.seed), decoder=checkpoint.require_decoder())
        return export_flash_folder(checkpoint, encoder, layout, folder, recipe, reference)
    config = diffusers_config(class_name, spec, encoder.spec, written.statistics)
    tensors, exact = written.tensors(layout, encoder)
    return export_diffusers(
        tensors,
        config,
        folder,
        reference=written.reference(recipe.seed),
        dtype=DTYPES[recipe.dtype],
        exact=exact,
        notes=(
            *written.notes("diffusers"),
            f"diffusers: {class_name}.from_pretrained loads the folder, encoder included",
            *([_NOISY] if any(config.get("decoder_inject_noise", ())) else []),
        ),
    )


def diffusers_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be exported as a diffusers folder; None if it can."""
    written = prepared(checkpoint)
    if written.class_name is None:
        return f"no diffusers folder: it has no class for {checkpoint.family}"
    if not all(written.statistics):
        return "no diffusers folder: a diffusers model has latent statistics, and this decoder has none"
    return None


def prepared(checkpoint: Checkpoint) -> Prepared:
    """The checkpoint in a form that layouts can hold, and the layouts of its family."""
    given = checkpoint.require_decoder()
    decoder = expanded_decoder(given)
    layouts = [layout for layout in LAYOUTS.values() if layout.family == checkpoint.family and layout.config_class]
    own = original_layout(checkpoint.family)
    return Prepared(checkpoint, decoder, decoder.spec != given.spec, own, layouts[0] if layouts else None)


def encoder_at_hand(checkpoint: Checkpoint, recipe: ExportRecipe) -> Encoder | None:
    """The encoder of a checkpoint, or of its original; None if neither can be read.

    Raises:
        ArtifactError: the recipe names an original that is not this decoder's, or cannot be read.
    """
    if checkpoint.encoder is not None or checkpoint.header is None or checkpoint.header.original is None:
        return checkpoint.encoder
    named, download = recipe.original, recipe.allow_download
    try:
        return load_original(checkpoint, named, BUILTINS, needs_encoder=False, allow_download=download).encoder
    except ArtifactError:
        if named is not None:
            raise
        return None


def _reload_decoder(path: Path) -> Decoder:
    return load_checkpoint(path, builtins={}).require_decoder()


def _check_latents(checkpoint: Checkpoint, seed: int) -> torch.Tensor:
    spec = checkpoint.require_decoder().spec
    num_latents, height, width = _CHECK_GRID
    grid = (1 if spec.still else num_latents, height, width)
    mean, std = checkpoint.latent_mean or None, checkpoint.latent_std or None
    return seeded_latents(spec, grid, seed=seed, latent_mean=mean, latent_std=std)
