"""A diffusers folder for a decoder that no class of diffusers can hold: `AutoencoderFlash`, with its spec."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header
from flashvaed_cli.artifact.foreign.flash_folder import BASE, CODE, CODE_NAME, DECODER, FLASH_CLASS, flash_config
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.export.checkpoint_file import Reference, export_diffusers
from flashvaed_cli.export.diffusers_config import diffusers_config, encoder_fault
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import get_family, original_like
from flashvaed_cli.families.uniform_layout import encoder_base_width
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.stages.common.loading import DTYPES

_LOADS = (
    f"diffusers: AutoModel.from_pretrained(folder, trust_remote_code=True) loads it as {FLASH_CLASS} where flashvaed "
    "is installed"
)


def export_flash_folder(
    checkpoint: Checkpoint,
    encoder: Encoder | None,
    layout: Layout,
    folder: Path,
    recipe: ExportRecipe,
    reference: Reference,
) -> ExportResult:
    """Write a folder that diffusers loads with flashvaed's class, with the encoder if there is one.

    Args:
        encoder: that of the checkpoint or its original.
        layout: that of the family's own class in diffusers.
    Raises:
        ExportError: latent statistics are unknown, or the folder does not reproduce the decoder.
    """
    assert layout.config_class is not None
    decoder, statistics = checkpoint.require_decoder(), (checkpoint.latent_mean, checkpoint.latent_std)
    lacks = "no encoder is at hand (--original names the VAE that has it)" if encoder is None else None
    width = None if encoder is None else encoder_base_width(encoder.spec)
    base = original_like(decoder.spec)(
        width or get_family(checkpoint.family).released_base_width, decoder.spec.latent_width
    )
    if encoder is not None and (fault := encoder_fault(layout.config_class, base, encoder.spec)) is not None:
        encoder, lacks = None, fault
    base_config = diffusers_config(layout.config_class, base, None if encoder is None else encoder.spec, statistics)
    tensors = {f"{DECODER}{name}": tensor for name, tensor in decoder.state_dict().items()}
    tensors |= {f"{BASE}{name}": tensor for name, tensor in _beside_the_decoder(encoder, layout, statistics).items()}
    config = flash_config(
        derived_header(checkpoint),
        base_class=layout.config_class,
        base_config=base_config,
        has_encoder=encoder is not None,
    )
    return export_diffusers(
        tensors,
        {"_class_name": FLASH_CLASS, **config},
        folder,
        reference=reference,
        dtype=DTYPES[recipe.dtype],
        exact=frozenset(f"{BASE}{name}" for name in layout.statistics or ()),
        beside={CODE_NAME: CODE},
        notes=(f"{_LOADS}, encoder included" if lacks is None else f"{_LOADS}; it decodes only: {lacks}",),
    )


def _beside_the_decoder(
    encoder: Encoder | None, layout: Layout, statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> dict[str, Tensor]:
    """The tensors of the family's class besides its decoder: the encoder, and statistics that are buffers."""
    coders = [] if encoder is None else [(encoder.state_dict(), encoder.spec)]
    return to_program(coders, layout, statistics)
