"""`export -t comfyui`: a file for ComfyUI's own loader if that reads the decoder, else a folder with a node."""

from __future__ import annotations

from pathlib import Path

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.comfyui.node import NODE_PREFIX
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.checkpoint_file import READ_BACK, export_safetensors, read_back
from flashvaed_cli.export.comfyui import file_metadata, single_file_obstacle, stand_in_encoder, write_node_folder
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.export.layouts import Prepared, encoder_at_hand, prepared

COMFYUI_FOLDER = "comfyui"
DECODES_ONLY = "flashvaed.decodes_only"
"""Key in the metadata of a file whose encoder is a stand-in."""
_DECODES_ONLY_NOTE = (
    "comfyui: the file decodes only. ComfyUI builds encoder and decoder at one width, so the encoder in it is a "
    "stand-in of zeros. To encode (image to video), use the original VAE, or prune with --with-encoder"
)


def export_comfyui(checkpoint: Checkpoint, folder: Path, name: str, recipe: ExportRecipe) -> ExportResult:
    """Write the checkpoint's decoder into `folder` in a form that ComfyUI loads.

    Raises:
        ExportError: what was written does not reproduce the decoder.
    """
    written, encoder = prepared(checkpoint), encoder_at_hand(checkpoint, recipe)
    stand_in = stand_in_encoder(written.decoder.spec, None if encoder is None else encoder.spec)
    encoder = stand_in or encoder
    obstacle = single_file_obstacle(written.decoder.spec, None if encoder is None else encoder.spec)
    reader = get_family(checkpoint.family).elsewhere.comfyui
    if obstacle is not None and reader is not None and not reader.has_node:
        raise ExportError(
            f"comfyui: its own loader does not read this decoder ({obstacle}), and latents of {checkpoint.family} have "
            "no axis of time there, which flashvaed's node needs. Export -t diffusers or -t onnx instead"
        )
    folder.mkdir()
    if obstacle is not None:
        return _node_folder(checkpoint, written, folder / name, obstacle, recipe)
    tensors, exact = written.tensors(written.original, encoder)
    prefix = written.original.prefix
    return export_safetensors(
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items()},
        folder / f"{name}.safetensors",
        {**file_metadata(written.decoder.spec), **({} if stand_in is None else {DECODES_ONLY: "true"})},
        target="comfyui",
        reference=written.reference(recipe.seed),
        dtype=DTYPES[recipe.dtype],
        exact=frozenset(key.removeprefix(prefix) for key in exact),
        notes=(
            *written.notes("comfyui"),
            "comfyui: put the file into models/vae; Load VAE reads it",
            *([] if stand_in is None else [_DECODES_ONLY_NOTE]),
        ),
    )


def _node_folder(
    checkpoint: Checkpoint, written: Prepared, folder: Path, obstacle: str, recipe: ExportRecipe
) -> ExportResult:
    folder.mkdir()
    decoder = folder / f"{folder.name}.safetensors"
    header = derived_header(checkpoint) if checkpoint.header is None else checkpoint.header
    dtype = DTYPES[recipe.dtype]
    save_checkpoint(decoder, header, decoder=checkpoint.require_decoder(), dtype=dtype)
    reference = written.reference(recipe.seed, _reload_artifact)
    difference, allowed = read_back(reference, decoder, dtype, decoder.name)
    paths = (decoder, *write_node_folder(folder, decoder, f"{NODE_PREFIX}{folder.name}", checkpoint.family))
    notes = (
        f"comfyui: its own loader does not read this decoder ({obstacle}): put the folder {folder.name} into "
        "custom_nodes, with flashvaed installed",
    )
    size_bytes = sum(path.stat().st_size for path in paths)
    return ExportResult("comfyui", paths, size_bytes, difference, allowed, READ_BACK, notes=notes)


def _reload_artifact(path: Path) -> Decoder:
    return load_checkpoint(path, builtins={}).require_decoder()
