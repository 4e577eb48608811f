"""Folders of `AutoencoderFlash`: any decoder as a diffusers model, with its spec in the configuration.

`decoder.*` are our tensors; `base.*` are those of the family's diffusers class outside its decoder: the encoder, if
there is one, and buffers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flashvaed_cli.artifact.foreign.coders import coders_from_foreign, empty_coder, fill_coder, named_tensors, shapes_of
from flashvaed_cli.artifact.foreign.mismatch import compare_shapes
from flashvaed_cli.artifact.header import ArtifactHeader, dump_header, parse_header
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import LAYOUTS

FLASH_CLASS = "AutoencoderFlash"
BASE, DECODER = "base.", "decoder."
CODE_NAME = "flash_vae.py"
CODE = f'''"""The class of the weights beside this file; needs the package flashvaed (pip install flashvaed)."""

from flashvaed_cli.api.diffusers_vae import {FLASH_CLASS}

__all__ = ["{FLASH_CLASS}"]
'''
"""The code that `trust_remote_code` runs: it imports the class from the installed flashvaed."""


def flash_config(
    header: ArtifactHeader, *, base_class: str, base_config: Mapping[str, Any], has_encoder: bool
) -> dict[str, Any]:
    """The configuration that `AutoencoderFlash` is built from.

    Args:
        header: of the decoder, with its spec and latent statistics.
        base_class: diffusers' class of the family.
        base_config: configuration of that class, with the encoder's widths; pipelines read it.
        has_encoder: whether the weights hold an encoder.
    """
    no_history = {"recipe": {}, "command_line": "", "seed": None, "measured": {}, "run": None}
    kept = {**no_history, "kind": "decoder", "encoder": None}
    return {
        "flash": json.loads(dump_header(header.model_copy(update=kept))),
        "base_class": base_class,
        "base_config": {key: value for key, value in base_config.items() if not key.startswith("_")},
        "has_encoder": has_encoder,
        "auto_map": {"AutoModel": f"{CODE_NAME.removesuffix('.py')}.{FLASH_CLASS}"},
    }


def flash_header(config: Mapping[str, Any], location: str) -> ArtifactHeader:
    """The decoder's header in a configuration. Raises ArtifactError if it is damaged."""
    header = parse_header(json.dumps(config.get("flash")), location)
    if header.decoder is None:
        raise ArtifactError(f"{location}: its configuration has no decoder. Export it again.")
    return header


def flash_coders(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], header: ArtifactHeader, location: str
) -> tuple[Decoder, Encoder | None]:
    """The decoder and, if there is one, the encoder of such a folder.

    Raises:
        ArtifactError: tensors that do not fit the configuration.
    """
    assert header.decoder is not None
    found = {name.removeprefix(DECODER): tensor for name, tensor in tensors.items() if name.startswith(DECODER)}
    decoder = empty_coder(header.decoder)
    expected = {name: tuple(value.shape) for name, value in named_tensors(decoder)}
    compare_shapes(expected, shapes_of(found)).raise_if_any(location, FLASH_CLASS)
    fill_coder(decoder, found, location)
    assert isinstance(decoder, Decoder)
    if not config.get("has_encoder"):
        return decoder, None
    layout = flash_layout(header.family)
    rest = {name.removeprefix(BASE): tensor for name, tensor in tensors.items() if name.startswith(BASE)}
    coders: Mapping[Any, Coder] = coders_from_foreign(rest, layout, location, config.get("base_config"))
    encoder = coders.get("encoder")
    return decoder, encoder if isinstance(encoder, Encoder) else None


def flash_layout(family: str) -> Layout:
    """The layout of a family's diffusers class. Raises ArtifactError if there is none."""
    for layout in LAYOUTS.values():
        if layout.family == family and layout.config_class is not None:
            return layout
    raise ArtifactError(f"diffusers has no class for {family}, so none for its encoder.")
