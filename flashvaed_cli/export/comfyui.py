"""What ComfyUI takes of a decoder: a file for `models/vae`, or a folder for `custom_nodes`.

Reference: the loader of ComfyUI 0.3.75 (facts only), and the configurations in the released LTX-Video files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashvaed_cli.decoders.families import encoder_like, get_family, original_like
from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.uniform_layout import encoder_base_width, fits_uniform_layout

LATENTS = "latents.latent"
_ANY_WIDTH = {"wan2.1", "qwen-image"}  # ComfyUI reads the width from the file; elsewhere it is fixed


def _blocks(*entries: tuple[str, Any]) -> list[list[Any]]:
    return [list(entry) for entry in entries]


def _decoder_blocks(*layers: int, noise: int) -> list[list[Any]]:
    """Runs of residual blocks, the first `noise` of them with noise, with a doubling between them."""
    runs = [["res_x", {"num_layers": n, "inject_noise": i < noise}] for i, n in enumerate(layers)]
    doubling = ["compress_all", {"residual": True, "multiplier": 2}]
    return [entry for run in runs[:-1] for entry in (run, doubling)] + [runs[-1]]


def _runs(*layers: int) -> list[list[Any]]:
    return [["res_x", {"num_layers": n}] for n in layers]


_OLD_ENCODER = _blocks(
    *[("res_x", {"num_layers": 4}), ("compress_all", {}), ("res_x_y", 1), ("res_x", {"num_layers": 3})],
    *[("compress_all", {}), ("res_x_y", 1), ("res_x", {"num_layers": 3})],
    *[("compress_all", {}), ("res_x", {"num_layers": 3}), ("res_x", {"num_layers": 4})],
)
_NEW_ENCODER = [
    entry
    for run, kind in zip(_runs(4, 6, 6, 2), ("space", "time", "all", "all"), strict=True)
    for entry in (run, [f"compress_{kind}_res", {"multiplier": 2}])
] + _runs(2)
_LTX_BLOCKS: dict[str, dict[str, list[list[Any]]]] = {
    "ltx-video-0.9.0": {
        "blocks": _blocks(
            *[("res_x", 4), ("compress_all", 1), ("res_x_y", 1), ("res_x", 3), ("compress_all", 1)],
            *[("res_x_y", 1), ("res_x", 3), ("compress_all", 1), ("res_x", 3), ("res_x", 4)],
        )
    },
    "ltx-video-0.9.1": {"decoder_blocks": _decoder_blocks(5, 6, 7, 8, noise=3), "encoder_blocks": _OLD_ENCODER},
    "ltx-video-0.9.5": {"decoder_blocks": _decoder_blocks(5, 5, 5, 5, noise=0), "encoder_blocks": _NEW_ENCODER},
}
_READ_FAMILIES = {"wan2.1", "wan2.2", "qwen-image", *_LTX_BLOCKS}


def single_file_obstacle(decoder: DecoderSpec, encoder: EncoderSpec | None) -> str | None:
    """Why ComfyUI's own loader does not read a decoder's file; None if it does."""
    family = get_family(decoder.family)
    fit = fits_uniform_layout(decoder, original_like(decoder))
    if family.name not in _READ_FAMILIES:
        return f"it has no class for {family.name}"
    if fit.base_width is None:
        return str(fit.deviation)
    if family.name not in _ANY_WIDTH and fit.base_width != family.released_base_width:
        return f"it builds {family.name} at base width {family.released_base_width} only, this has {fit.base_width}"
    if encoder is None:
        return "it wants an encoder in the file, and none is at hand"
    width = encoder_base_width(encoder)
    if family.name in _ANY_WIDTH and width != fit.base_width:
        return f"it wants encoder and decoder of one base width, these have {width} and {fit.base_width}"
    return None


def stand_in_encoder(decoder: DecoderSpec, encoder: EncoderSpec | None) -> Encoder | None:
    """An encoder of zeros for a decoder that lacks only one of its width; None where that is not what is lacking.

    A program that builds both at one width loads the file then, and decodes with it.

    Args:
        encoder: what would be written else.
    """
    base_width = fits_uniform_layout(decoder, original_like(decoder)).base_width
    family = get_family(decoder.family)
    if base_width is None or family.name not in _ANY_WIDTH:
        return None
    if encoder is not None and encoder_base_width(encoder) == base_width:
        return None
    stand_in = Encoder(encoder_like(encoder or decoder)(base_width, decoder.latent_width)).eval().requires_grad_(False)
    for parameter in stand_in.parameters():
        parameter.zero_()
    return stand_in


def file_metadata(decoder: DecoderSpec) -> dict[str, str]:
    """The metadata that its loader needs; only LTX's is read from there."""
    blocks = _LTX_BLOCKS.get(decoder.family)
    if blocks is None:
        return {"format": "pt"}
    said = get_family(decoder.family).described(decoder)
    config = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": decoder.latent_width,
        **blocks,
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": said["causal_decoder"],
        "timestep_conditioning": said["timestep_conditioning"],
        "spatial_padding_mode": said["spatial_padding_mode"],
    }
    return {"format": "pt", "config": json.dumps({"vae": config})}


def write_node_folder(folder: Path, decoder: Path, node: str, family: str) -> tuple[Path, ...]:
    """Write what makes a folder of a decoder a custom node; returns the files.

    Args:
        folder: holds `decoder` already.
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
    """Saved latents through the decoder to pictures, in ComfyUI's API format."""
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
   previews work as before. Tiles do not show, whatever overlap you choose.

It decodes only. To encode (image to video), connect the stock VAE to the node's `encoder` input, or encode with that.

`workflow.json` decodes saved latents: put a file from *Save Latent* into `ComfyUI/input/` as `{latents}`, and drop the
workflow on ComfyUI's window. `{name}` holds the weights; nothing else in `{folder}/` depends on it.
"""
