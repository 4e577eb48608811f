"""`flashvaed.load`: a decoder, with its encoder if there is one, ready to call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.original import load_original
from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.run.latent_scale import figures_over, unpatched
from flashvaed_cli.decoders.run.less_memory import decode_in_memory
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings, DecodeStream
from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.decoders.spec.latent_patches import are_per_place
from flashvaed_cli.decoders.variants.exact import exact_coder, exact_decoder
from flashvaed_cli.errors import FlashVaedError, SpecError
from flashvaed_cli.recipe.fields import LatentScale
from flashvaed_cli.recipe.quantities import parse_memory
from flashvaed_cli.stages.common.loading import DTYPES, choose_device
from flashvaed_cli.zoo.builtin import BUILTINS


def load(
    location: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    chunk: int | None = None,
    tile: int | None = None,
    clip_length: int | None = None,
    max_memory: str | int | None = None,
    compile: bool = False,
    original: str | Path | None = None,
    family: str | None = None,
    weights: str | None = None,
) -> Vae:
    """Load a decoder that is ready to call.

        vae = flashvaed.load("flash.safetensors", device="cuda", dtype="bfloat16")
        video = vae.decode(latents, scale="normalized")

    It runs on the device's fastest operators that give the same frames.

    Args:
        location: an artifact, another program's checkpoint, a diffusers folder, `hf://owner/repo/path` or
            `builtin:NAME`.
        device: where to decode; `auto` takes CUDA, then MPS, then the CPU.
        dtype: of weights, activations and frames: `float32`, `bfloat16` or `float16`.
        chunk: latent frames per step; None: all at once, or what `max_memory` allows.
        tile: side of a tile in latents; None: whole frames, or what `max_memory` requires. Tiles leave no seams.
        clip_length: latent frames that are one clip to a decoder that sees whole clips; None: its own. Other lengths
            give other frames.
        max_memory: limit for the predicted peak, such as "8GiB", or bytes.
        compile: decode with `torch.compile`; every clip size compiles once, at its first use.
        original: the VAE that the decoder was made for, whose encoder `encode` uses; None: the recorded one.
        family: for a checkpoint whose names leave it open, such as `wan2.1`.
        weights: which of several sets of weights in a file, such as `ema`.
    Raises:
        ArtifactError: not found, not readable or from another model.
        FlashVaedError: this machine has no such device, or an unknown dtype or amount of memory.
        SpecError: a clip length for a decoder that has none, or one that does not fit.
    """
    target = _device(device)
    settings = DecodeSettings(
        chunk=chunk,
        tile=tile,
        dtype=_dtype(dtype),
        compile=compile,
        max_memory_bytes=num_bytes(max_memory),
        clip_length=clip_length,
    )
    named = None if original is None else str(original)
    checkpoint = load_checkpoint(location, builtins=BUILTINS, family=family, weights=weights, original=named)
    return Vae(checkpoint, target, settings, original=named)


class Vae:
    """A decoder with its settings, and the encoder for its latents if there is one. Made by `load`.

    Attributes:
        family: such as `wan2.1`.
        device, dtype: of weights and frames.
        latent_channels: C of the latents `[B, C, T, Hz, Wz]`.
        temporal_factor, spatial_factor: a clip has F = 1 + temporal_factor * (T - 1) frames of
            Hz * spatial_factor x Wz * spatial_factor pixels.
        latent_mean, latent_std: per channel; normalized = (raw - mean) / std. Empty if unknown.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, settings: DecodeSettings, *, original: str | None = None
    ) -> None:
        decoder = exact_decoder(checkpoint.require_decoder().to(device))
        self._checkpoint, self._original = checkpoint, original
        self._runtime = DecodeRuntime(decoder, settings, shares_weights=True)
        self._encoder: Encoder | None = None
        self.family = checkpoint.family
        self.device, self.dtype = device, self._runtime.dtype
        self.latent_channels = decoder.spec.latent_width
        self.temporal_factor, self.spatial_factor = decoder.spec.temporal_factor, decoder.spec.spatial_factor
        self.latent_mean, self.latent_std = checkpoint.latent_mean, checkpoint.latent_std

    def decode(
        self, latents: Float[Tensor, "B C T Hz Wz"], *, scale: LatentScale = "normalized"
    ) -> Float[Tensor, "B 3 F H W"]:
        """All frames, in [-1, 1]. Where memory runs out, a warning says so, and smaller chunks and tiles are taken.

            video = vae.decode(latents)   # as the diffusion model gave them

        Args:
            latents: on any device.
            scale: of the latents.
        Raises:
            SpecError: latents of another shape, or an unknown scale.
            DecodeError: no plan fits `max_memory`, or frames that are not finite.
            ArtifactError: the latents are normalized, but their mean and deviation are unknown.
        """
        return decode_in_memory(self._runtime, self._raw(latents, scale), warnings.warn)

    def iter_decode(
        self, latents: Float[Tensor, "B C T Hz Wz"], *, scale: LatentScale = "normalized"
    ) -> Iterator[Float[Tensor, "B 3 f H W"]]:
        """The frames step by step, `chunk` latent frames each; memory does not grow with the clip.

            for frames in vae.iter_decode(latents):
                writer.write(frames)

        Raises:
            SpecError, DecodeError, ArtifactError: as `decode` does.
        """
        return self._runtime.iter_decode(self._raw(latents, scale))

    def stream(self, height: int, width: int, *, batch: int = 1, scale: LatentScale = "normalized") -> VaeStream:
        """Begin a clip whose latents come in parts.

            stream = vae.stream(60, 104)
            for part in parts:              # [B, C, t, 60, 104]
                show(stream.step(part))
            show(stream.flush())

        Args:
            height, width: of the latents.
        Raises:
            SpecError, DecodeError, ArtifactError: as `decode` does.
        """
        self._check_scale(scale)
        return VaeStream(self, self._runtime.open(height, width, batch=batch), scale)

    @torch.no_grad()
    def encode(
        self, frames: Float[Tensor, "B 3 F H W"], *, scale: LatentScale = "normalized"
    ) -> Float[Tensor, "B C T Hz Wz"]:
        """The latents of frames in [-1, 1]: the mean of the posterior, on the device and in the dtype of the decoder.

        The encoder is the artifact's own or the original VAE's, which is looked up at the first call.

            latents = vae.encode(video)   # F = 1 + temporal_factor * n

        Raises:
            ArtifactError: there is no encoder.
            SpecError: a number of frames or a size that latents cannot represent.
        """
        self._check_scale(scale)
        raw = encode(self._require_encoder(), frames.to(self.device, self.dtype))
        if scale == "raw":
            return raw
        mean, std = self._statistics(raw)
        return ((raw - mean) / std).to(self.dtype)

    def _require_encoder(self) -> Encoder:
        if self._encoder is None:
            source = self._checkpoint
            if source.encoder is None or self._original is not None:
                source = load_original(source, self._original, BUILTINS)
            self._encoder = exact_coder(source.require_encoder().to(self.device, self.dtype))
        return self._encoder

    def _raw(self, latents: Tensor, scale: LatentScale) -> Tensor:
        self._check_scale(scale)
        if scale == "raw":
            return latents
        if latents.ndim == 5 and are_per_place(latents.shape[1], self.latent_channels) and self._are_per_place:
            latents = unpatched(latents)
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            return latents  # the runtime names the fault
        mean, std = self._statistics(latents)
        return latents.float() * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation as float32 `[C, 1, 1, 1]` or, of patches, `[C, 1, Hz, Wz]`, where `like` is."""
        mean, std = self._checkpoint.require_statistics()
        return figures_over(mean, like), figures_over(std, like)

    @property
    def _are_per_place(self) -> bool:
        return are_per_place(len(self.latent_mean), self.latent_channels)

    @staticmethod
    def _check_scale(scale: str) -> None:
        if scale not in ("normalized", "raw"):
            raise SpecError(f"scale is {scale!r}: give 'normalized' (as diffusion models do) or 'raw'")

    def __repr__(self) -> str:
        return f"Vae({self._checkpoint.location!r}, {self.family}, {self.device}, {self.dtype})"


class VaeStream:
    """One clip that is decoded as its latents come. Made by `Vae.stream`."""

    def __init__(self, vae: Vae, stream: DecodeStream, scale: LatentScale) -> None:
        self._vae, self._stream = vae, stream
        self._scale: LatentScale = scale

    def step(self, latents: Float[Tensor, "B C t Hz Wz"]) -> Float[Tensor, "B 3 f H W"]:
        """The frames that the next latents complete, in [-1, 1]; none if the decoder must see later latents first.

        Raises:
            SpecError: latents of another shape than the stream was opened for, or it was flushed.
        """
        return self._stream.step(self._vae._raw(latents, self._scale))

    def flush(self) -> Float[Tensor, "B 3 f H W"]:
        """The remaining frames at the end of the clip. This ends the stream."""
        return self._stream.flush()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return choose_device("auto")
    try:
        named = torch.device(device)
    except RuntimeError:
        raise FlashVaedError(
            f"device is {device!r}, which torch does not know: give cpu, cuda, cuda:1 or mps"
        ) from None
    if named.type in ("cpu", "cuda", "mps"):
        choose_device(str(named))
    return named


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise FlashVaedError(f"dtype is {dtype}, which a decoder cannot run in: give {', '.join(DTYPES)}")
    return found


def num_bytes(amount: str | int | None) -> int | None:
    """An amount of memory in bytes. Raises FlashVaedError if it is none."""
    try:
        return parse_memory(amount) if isinstance(amount, str) else amount
    except ValueError as error:
        raise FlashVaedError(f"max_memory is {amount!r}: it {error}") from None
