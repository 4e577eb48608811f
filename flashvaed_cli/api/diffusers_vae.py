"""A decoder of any architecture as a diffusers model: what pipelines call `vae`.

Needs diffusers; nothing but `accelerate` and folders of this class import it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.artifact.foreign.coders import empty_coder
from flashvaed_cli.artifact.foreign.flash_folder import CODE, CODE_NAME, FLASH_CLASS, flash_config, flash_header
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_spec, plain_decoder, with_spec
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.errors import ArtifactError, FlashVaedError, SpecError

_DECODER_PARTS = ("decoder", "post_quant_conv")
_ENCODER_PARTS = ("encoder", "quant_conv")
_TILE_PIXELS = 256


class AutoencoderFlash(ModelMixin, ConfigMixin):
    """diffusers' VAE of a family with another decoder: `decode` is flashvaed's, all else is the family's own class.

        vae = AutoencoderFlash.from_pretrained("export/diffusers")
        pipe = WanPipeline.from_pretrained(model, vae=vae)

    `decode` takes raw latents `[B, C, T, Hz, Wz]` and gives frames `[B, 3, F, H, W]` in [-1, 1]; it computes no
    gradients. `config` has all that the family's class has, and what pipelines read as attributes is there too.
    Tiles (`enable_tiling`) do not show: they overlap by what their frames depend on.

    Attributes:
        decoder: flashvaed's module.
        base: a model of the family's class without its decoder; without its encoder too if `has_encoder` is false.
        chunk: latent frames per step; None: the whole clip, which a decoder that sees frames ahead takes by default.
        max_memory_bytes: limit of the predicted peak of `decode`; None: none.
        compiles: decode with `torch.compile`.
    """

    _supports_gradient_checkpointing = False
    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        flash: dict[str, Any],
        base_class: str,
        base_config: dict[str, Any],
        has_encoder: bool = True,
        auto_map: dict[str, str] | None = None,
    ) -> None:
        """Build it without weights; see `flash_config` for the arguments.

        Raises:
            ArtifactError: a damaged header, or this diffusers has no such class.
        """
        super().__init__()
        header = flash_header({"flash": flash}, FLASH_CLASS)
        assert header.decoder is not None
        self.decoder = empty_coder(header.decoder).to_empty(device="cpu").eval().requires_grad_(False)
        self.base = _empty_base(base_class, base_config, has_encoder=has_encoder)
        self.chunk: int | None = 1 if header.decoder.is_causal else None
        self.max_memory_bytes: int | None = None
        self.compiles = self.use_tiling = self.use_slicing = False
        self._tile_pixels = _TILE_PIXELS
        self._decoder_at: Callable[[float], Decoder] | None = None
        self._prepared: tuple[object, DecodeRuntime] | None = None

    @classmethod
    def replacing(cls, vae: nn.Module, decoder: Decoder, header: ArtifactHeader) -> AutoencoderFlash:
        """A model with the encoder and the configuration of a pipeline's VAE, sharing its modules, and `decoder`.

        Args:
            vae: of the family's diffusers class, or one of these models.
            decoder: raw latents to frames; becomes part of the model.
            header: of the decoder.
        """
        base, own = (vae.base, vae.config) if isinstance(vae, cls) else (_without_decoder(vae), None)
        base_class = type(base).__name__ if own is None else own["base_class"]
        has_encoder = True if own is None else own["has_encoder"]
        base_config = cast(Mapping[str, Any], base.config)
        header = header.model_copy(update={"decoder": decoder.spec})
        model = cls(**flash_config(header, base_class=base_class, base_config=base_config, has_encoder=has_encoder))
        model.base, model.decoder = base, decoder
        return model.eval()

    def follow_timesteps(self, decoder_at: Callable[[float], Decoder]) -> None:
        """Decode as a decoder that is conditioned on the timestep: `decoder_at` gives the one of a timestep."""
        self._decoder_at = decoder_at

    @property
    def config(self) -> FrozenDict:
        """That of the family's class and of this one. A decoder for one timestep is not conditioned on it."""
        own = self._internal_dict
        given = {key: value for key, value in own["base_config"].items() if key not in own}
        if "timestep_conditioning" in given:
            given["timestep_conditioning"] = self._decoder_at is not None
        return FrozenDict({**given, **own})

    def __getattr__(self, name: str) -> Any:
        """What is not here is the family's: `temperal_downsample`, `latents_mean`, `spatial_compression_ratio`."""
        modules = self.__dict__.get("_modules", {})
        if name in modules or name.startswith("_") or "base" not in modules:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(modules["base"], name)

    @apply_forward_hook
    def encode(self, x: Float[Tensor, "B 3 F H W"], *args: Any, **kwargs: Any) -> Any:
        """As the family's class does. Raises FlashVaedError if there is no encoder."""
        if not self.config["has_encoder"]:
            raise FlashVaedError(
                "this VAE holds a decoder but no encoder, which image-to-video and video-to-video need. "
                "Put the decoder into a whole pipeline with flashvaed.accelerate(pipe, ...)."
            )
        return cast(Any, self.base).encode(x, *args, **kwargs)

    @apply_forward_hook
    def decode(
        self,
        z: Float[Tensor, "B C T Hz Wz"],
        timestep: Tensor | None = None,
        return_dict: bool = True,
        *,
        temb: Tensor | None = None,
        causal: bool | None = None,
        generator: object = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """The frames of raw latents, in [-1, 1].

        Args:
            z: of a family of images also `[B, C, Hz, Wz]`, which gives images `[B, 3, H, W]`.
            timestep, temb: of a decoder that follows timesteps; others were made for one and leave it aside.
            causal: must be as the decoder is, if it is given.
            generator: left aside: nothing is drawn.
        Raises:
            SpecError: latents of another shape, or another `causal`.
            DecodeError: no plan fits `max_memory_bytes`, or frames that are not finite.
        """
        spec = self._own_decoder.spec
        are_images = z.ndim == 4 and spec.temporal_factor == 1
        z = z.unsqueeze(2) if are_images else z
        if causal is not None and causal != spec.is_causal:
            raise SpecError(f"causal is {causal}, and this decoder was made with {spec.is_causal}: leave it out")
        timestep = temb if timestep is None else timestep
        if self._decoder_at is not None and timestep is not None:
            times = timestep.flatten().tolist() * (z.shape[0] if timestep.numel() == 1 else 1)
            frames = torch.cat([self._at(time)._decode(part) for time, part in zip(times, z.split(1), strict=True)])
        else:
            frames = torch.cat([self._decode(part) for part in z.split(1)]) if self.use_slicing else self._decode(z)
        frames = frames.squeeze(2) if are_images else frames
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def forward(self, sample: Float[Tensor, "B 3 F H W"], return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode (the mean of the posterior) and decode."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)

    @property
    def _own_decoder(self) -> Decoder:
        return cast(Decoder, self.decoder)

    def _at(self, time: float) -> AutoencoderFlash:
        if time != self._own_decoder.spec.decode_timestep:
            assert self._decoder_at is not None
            self.decoder = cast_decoder(self._decoder_at(time).to(self.device), self.dtype)
        return self

    def _decode(self, z: Tensor) -> Tensor:
        return self._runtime().decode(z)

    def _runtime(self) -> DecodeRuntime:
        decoder = self._own_decoder
        parameter = next(decoder.parameters())
        tile = max(self._tile_pixels // decoder.spec.spatial_factor, 1) if self.use_tiling else None
        settings = DecodeSettings(
            chunk=self.chunk, tile=tile, compile=self.compiles, max_memory_bytes=self.max_memory_bytes
        )
        fastest = exact_spec(decoder.spec, device_type=parameter.device.type)
        if fastest != decoder.spec:
            decoder = self.decoder = with_spec(decoder, fastest)  # the same parameters
        key = id(decoder), parameter.device, parameter.dtype, settings
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, DecodeRuntime(decoder, settings, shares_weights=True)
        return self._prepared[1]

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        *args: Any,
        **more: Any,
    ) -> None:
        """Decode in tiles of at most this many pixels a side; of the encoder, as the family's class does.

        Strides are for the encoder alone: these tiles overlap by what their frames depend on.
        """
        self.use_tiling = True
        sides = [side for side in (tile_sample_min_height, tile_sample_min_width) if side]
        self._tile_pixels = min(sides) if sides else self._tile_pixels
        cast(Any, self.base).enable_tiling(tile_sample_min_height, tile_sample_min_width, *args, **more)

    def disable_tiling(self) -> None:
        """Decode whole frames."""
        self.use_tiling = False
        cast(Any, self.base).disable_tiling()

    def enable_slicing(self) -> None:
        """Decode and encode the clips of a batch one by one."""
        self.use_slicing = True
        cast(Any, self.base).enable_slicing()

    def disable_slicing(self) -> None:
        """Decode and encode the clips of a batch together."""
        self.use_slicing = False
        cast(Any, self.base).disable_slicing()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, with the file that `trust_remote_code` reads beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CODE_NAME).write_text(CODE, encoding="utf-8")

    def flash_artifact(self) -> tuple[ArtifactHeader, Decoder]:
        """The decoder with plain operators, and its header."""
        return flash_header(self._internal_dict, FLASH_CLASS), plain_decoder(self._own_decoder)


def _empty_base(base_class: str, base_config: Mapping[str, Any], *, has_encoder: bool) -> nn.Module:
    """A model of the family's class without decoder, its weights still to be loaded."""
    import diffusers

    build = getattr(diffusers, base_class, None)
    if build is None:
        raise ArtifactError(
            f"diffusers {diffusers.__version__} has no {base_class}, which this VAE's encoder is of. Upgrade diffusers."
        )
    with torch.device("meta"):
        base = build.from_config(dict(base_config))
    _drop(base, _DECODER_PARTS if has_encoder else (*_DECODER_PARTS, *_ENCODER_PARTS))
    return base.to_empty(device="cpu").eval().requires_grad_(False)


def _without_decoder(vae: nn.Module) -> nn.Module:
    """A VAE that shares all modules with the one given, but has no decoder."""
    base = copy.copy(vae)
    base._modules = dict(vae._modules)
    _drop(base, _DECODER_PARTS)
    return base


def _drop(vae: nn.Module, parts: tuple[str, ...]) -> None:
    for part in parts:
        if part in vae._modules:
            vae._modules[part] = nn.Identity()
