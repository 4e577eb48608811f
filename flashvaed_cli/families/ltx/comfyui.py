"""The configuration that ComfyUI needs in the metadata of an LTX-Video file: it lists the release's blocks.

Reference: the configurations in the released LTX-Video files (facts only).
"""

from __future__ import annotations

from typing import Any

from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.families.ltx.config import described


def _blocks(*entries: tuple[str, Any]) -> list[list[Any]]:
    return [list(entry) for entry in entries]


def _decoder_blocks(*layers: int, noise: int) -> list[list[Any]]:
    """Runs of residual blocks, the first `noise` of them with noise, with a resampler between each two."""
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
_BLOCKS: dict[str, dict[str, list[list[Any]]]] = {
    "ltx-video-0.9.0": {
        "blocks": _blocks(
            *[("res_x", 4), ("compress_all", 1), ("res_x_y", 1), ("res_x", 3), ("compress_all", 1)],
            *[("res_x_y", 1), ("res_x", 3), ("compress_all", 1), ("res_x", 3), ("res_x", 4)],
        )
    },
    "ltx-video-0.9.1": {"decoder_blocks": _decoder_blocks(5, 6, 7, 8, noise=3), "encoder_blocks": _OLD_ENCODER},
    "ltx-video-0.9.5": {"decoder_blocks": _decoder_blocks(5, 5, 5, 5, noise=0), "encoder_blocks": _NEW_ENCODER},
}


def comfyui_config(decoder: DecoderSpec) -> dict[str, Any]:
    """The configuration for a decoder of 0.9.0, 0.9.1 or 0.9.5."""
    said = described(decoder)
    config = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": decoder.latent_width,
        **_BLOCKS[decoder.family],
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": said["causal_decoder"],
        "timestep_conditioning": said["timestep_conditioning"],
        "spatial_padding_mode": said["spatial_padding_mode"],
    }
    return {"vae": config}
