"""A decoder in the forms that ComfyUI takes: a file for `models/vae`, or a folder for `custom_nodes`.

Reference: the loader of ComfyUI 0.3.75 (facts only).
"""

from __future__ import annotations

import json
from pathlib import Path

from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.families.registry import encoder_like, get_family, original_like
from flashvaed_cli.families.uniform_layout import encoder_base_width, fits_uniform_layout

LATENTS = "latents.latent"


def single_file_obstacle(decoder: DecoderSpec, encoder: EncoderSpec | None) -> str | None:
    """Why ComfyUI's own loader cannot read a decoder's file; None if it can."""
    family = get_family(decoder.family)
    fit, reader = fits_uniform_layout(decoder, original_like(decoder)), family.elsewhere.comfyui
    if reader is None:
        return f"it has no class for {family.name}"
    if fit.base_width is None:
        return str(fit.deviation)
    if not reader.any_width and fit.base_width != family.released_base_width:
        return f"it builds {family.name} at base width {family.released_base_width} only, this has {fit.base_width}"
    if encoder is None:
        return "it needs an encoder in the file, and none is available"
    width = encoder_base_width(encoder)
    if reader.any_width and width != fit.base_width:
        return f"it needs encoder and decoder at one base width, but these have {width} and {fit.base_width}"
    return None


def stand_in_encoder(decoder: DecoderSpec, encoder: EncoderSpec | None) -> Encoder | None:
    """An encoder of zeros for a decoder that lacks nothing but an encoder of its width; None otherwise.

    A program that builds both at one width can then load the file and decode with it.

    Args:
        encoder: what would be written otherwise.
    """
    base_width = fits_uniform_layout(decoder, original_like(decoder)).base_width
    reader = get_family(decoder.family).elsewhere.comfyui
    if base_width is None or reader is None or not reader.any_width:
        return None
    if encoder is not None and encoder_base_width(encoder) == base_width:
        return None
    stand_in = Encoder(encoder_like(encoder or decoder)(base_width, decoder.latent_width)).eval().requires_grad_(False)
    for parameter in stand_in.parameters():
        parameter.zero_()
    return stand_in


def file_metadata(decoder: DecoderSpec) -> dict[str, str]:
    """The metadata that its loader needs."""
    reader = get_family(decoder.family).elsewhere.comfyui
    if reader is None or reader.config is None:
        return {"format": "pt"}
    return {"format": "pt", "config": json.dumps(reader.config(decoder))}


def write_node_folder(folder: Path, decoder: Path, node: str, family: str) -> tuple[Path, ...]:
    """Write what turns a decoder's folder into a custom node; returns the files.

    Args:
        folder: already holds `decoder`.
        node: the key of the loader node.
    """
    texts = {
        "__init__.py": _INIT.format(name=decoder.name),
        "README.md": _README.format(folder=folder.name, name=decoder.name, family=family, latents=LATENTS),
        "workflow.json": json.dumps(_workflow(node, decoder.stem), indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tuple(folder / name for name in texts)


def _workflow(node: str, name: str) -> dict[str, object]:
    """A workflow from saved latents through the decoder to pictures, in ComfyUI's API format."""
    return {
        "1": {"class_type": node, "inputs": {}},
        "2": {"class_type": "LoadLatent", "inputs": {"latent": LATENTS}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": name}},
    }


_INIT = '''"""A fast video decoder as a ComfyUI node; written by `flashvaed export`."""

from pathlib import Path

from flashvaed_cli.comfyui import node_mappings

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = node_mappings(Path(__file__).parent / "{name}")
'''

_README = """# A fast {family} decoder for ComfyUI

1. Install flashvaed in ComfyUI's Python: `pip install flashvaed`.
2. Put this folder into `ComfyUI/custom_nodes/` and restart ComfyUI.
3. Add *Load VAE: ... (flashvaed)* and connect its VAE where the stock VAE was: VAE Decode, VAE Decode (Tiled) and
   previews work as before. Tiles leave no seams, whatever overlap you choose.

It only decodes. To encode (image to video), connect the stock VAE to the node's `encoder` input, or encode with it.

`workflow.json` decodes saved latents: put a file from *Save Latent* into `ComfyUI/input/` as `{latents}`, and drop the
workflow on ComfyUI's window. `{name}` holds the weights; nothing else in `{folder}/` depends on it.
"""
