"""A decoder as a ComfyUI VAE: nodes for decoding, tiled decoding and previews use it like any other.

Reference: what those nodes read from `comfy.sd.VAE` (facts only), ComfyUI 0.3.75.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.memory import DType, predict_peak_bytes
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.families.registry import original_layout

_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_FREE_PART = 0.9
"""The share of the memory that ComfyUI reports as free that a decode plans with."""


def load_vae(path: Path, encoder: Any = None) -> Any:
    """A `comfy.sd.VAE` that decodes with the artifact at `path`.

    Args:
        encoder: a `comfy.sd.VAE` for the same latents, which does the encoding.
    Raises:
        ArtifactError: the artifact cannot be read.
    """
    comfy, management, patching = (
        importlib.import_module(f"comfy.{name}") for name in ("sd", "model_management", "model_patcher")
    )
    checkpoint = load_checkpoint(path, builtins={})
    device = management.vae_device()
    decoder = exact_decoder(checkpoint.require_decoder(), device_type=device.type)
    model = _Model(decoder, _statistics(checkpoint), management.get_free_memory).eval()
    vae = _vae_class(comfy.VAE)(model, encoder)
    vae.device, vae.vae_dtype = device, management.vae_dtype(device, vae.working_dtypes)
    vae.output_device = management.intermediate_device()
    cast_decoder(decoder, vae.vae_dtype)
    model.to(vae.vae_dtype)
    vae.patcher = patching.ModelPatcher(model, load_device=device, offload_device=management.vae_offload_device())
    vae.model_size()
    return vae


class _Model(nn.Module):
    """What ComfyUI moves between devices and calls: latents from its samplers to frames in [-1, 1]."""

    def __init__(
        self, decoder: Decoder, statistics: tuple[Sequence[float], Sequence[float]] | None, free_bytes: Any
    ) -> None:
        """Take a decoder.

        Args:
            statistics: mean and deviation per channel where latents arrive normalized; None where they arrive raw.
            free_bytes: of a device.
        """
        super().__init__()
        self.decoder, self.spec = decoder, decoder.spec
        self._statistics, self._free_bytes = statistics, free_bytes

    def decode(
        self, latents: Float[Tensor, "B C T H W"], *, tile: int | None = None, chunk: int | None = None, **_options: Any
    ) -> Float[Tensor, "B 3 F Hp Wp"]:
        """All frames; without `tile` and `chunk`, in steps that fit the free memory."""
        if self._statistics is not None:
            mean, std = (latents.new_tensor(row).view(-1, 1, 1, 1) for row in self._statistics)
            latents = latents * std + mean
        limit = None if tile or chunk else int(_FREE_PART * self._free_bytes(latents.device))
        runtime = DecodeRuntime(self.decoder, DecodeSettings(chunk=chunk, tile=tile, max_memory_bytes=limit))
        return runtime.decode(latents)

    def peak_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The least memory that decoding whole frames of these latents takes."""
        chunk = 1 if self.spec.is_causal else None
        return predict_peak_bytes(self.spec, (shape[2], shape[3], shape[4]), chunk=chunk, dtype=_DTYPES[dtype])


def _statistics(checkpoint: Checkpoint) -> tuple[Sequence[float], Sequence[float]] | None:
    """Families whose own files store the statistics among the weights get normalized latents, the others raw ones."""
    return checkpoint.require_statistics() if original_layout(checkpoint.family).statistics is not None else None


def _vae_class(parent: type) -> type:
    """ComfyUI's class with our model; its parent is known only inside ComfyUI."""

    class FlashVae(parent):  # type: ignore[misc]
        def __init__(self, model: _Model, encoder: Any) -> None:
            super().__init__(sd={})
            spec = model.spec
            time, space = spec.temporal_factor, spec.spatial_factor
            self.first_stage_model, self._encoder = model, encoder
            self.latent_channels, self.latent_dim, self.output_channels = spec.latent_width, 3, 3
            self.upscale_ratio = (lambda latents: max(0, latents * time - (time - 1)), space, space)
            self.downscale_ratio = (lambda frames: max(0, (frames + time - 1) // time), space, space)
            self.upscale_index_formula = self.downscale_index_formula = (time, space, space)
            self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
            self.memory_used_decode = model.peak_bytes
            self.memory_used_encode = lambda _shape, _dtype: 0
            self.size = None

        def decode_tiled_3d(
            self, samples: Tensor, tile_t: int = 999, tile_x: int = 32, tile_y: int = 32, overlap: Any = None
        ) -> Tensor:
            """Seamless tiles and steps: the overlap is what the decoder sees around a tile, whatever `overlap` says."""
            latents = samples.to(self.device, self.vae_dtype)
            frames = self.first_stage_model.decode(latents, tile=min(tile_x, tile_y), chunk=tile_t)
            return self.process_output(frames.to(self.output_device).float())

        def encode(self, *given: Any, **options: Any) -> Any:
            """Encode with the connected VAE."""
            return self._require_encoder().encode(*given, **options)

        def encode_tiled(self, *given: Any, **options: Any) -> Any:
            """Encode with the connected VAE."""
            return self._require_encoder().encode_tiled(*given, **options)

        def _require_encoder(self) -> Any:
            if self._encoder is None:
                raise FlashVaedError(
                    "this VAE only decodes: connect the VAE that it was made from to the loader's `encoder`, or encode "
                    "with that one"
                )
            return self._encoder

    return FlashVae
