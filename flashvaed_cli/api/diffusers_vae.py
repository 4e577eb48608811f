"""A decoder of any architecture as a diffusers model: what pipelines call `vae`.

Needs diffusers; only `accelerate` and folders of this class import it.
"""

from __future__ import annotations

import copy
import warnings
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
from flashvaed_cli.decoders.predict.tiling import split_addresses
from flashvaed_cli.decoders.run.less_memory import decode_in_memory
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_spec, plain_decoder, with_spec
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.errors import ArtifactError, FlashVaedError, SpecError

_DECODER_PARTS = ("decoder", "post_quant_conv")
_ENCODER_PARTS = ("encoder", "quant_conv")
_TILE_PIXELS = 256


class AutoencoderFlash(ModelMixin, ConfigMixin):
    """diffusers' VAE of a family with another decoder: `decode` is flashvaed's, everything else the family's own class.

        vae = AutoencoderFlash.from_pretrained("export/diffusers")
        pipe = WanPipeline.from_pretrained(model, vae=vae)

    `decode` takes raw latents `[B, C, T, Hz, Wz]` and returns frames `[B, 3, F, H, W]` in [-1, 1], without
    gradients. `config` and the attributes that pipelines read are those of the family's class.
    Tiles (`enable_tiling`) leave no seams: they overlap by everything that their frames depend on.

    Attributes:
        decoder: flashvaed's module.
        base: a model of the family's class without its decoder; without its encoder too if `has_encoder` is false.
        chunk: latent frames per step; None: the whole clip, which a decoder that sees frames ahead takes by default.
        max_memory_bytes: limit for the predicted peak of `decode`; None: no limit.
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
        """A model with `decoder` and with the encoder and config of a pipeline's VAE, sharing its modules.

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
        """Decode with timestep conditioning: `decoder_at` returns the decoder for a timestep."""
        self._decoder_at = decoder_at

    @property
    def config(self) -> FrozenDict:
        """The config of the family's class, with its defaults, and of this class. A decoder for one timestep is not
        conditioned on it."""
        own, base = self._internal_dict, self.__dict__.get("_modules", {}).get("base")
        whole = {**({} if base is None else base.config), **own["base_config"]}
        given = {key: value for key, value in whole.items() if key not in own and not key.startswith("_")}
        if "timestep_conditioning" in given:
            given["timestep_conditioning"] = self._decoder_at is not None
        return FrozenDict({**given, **own})

    def __getattr__(self, name: str) -> Any:
        """Anything else is the family's: `temperal_downsample`, `latents_mean`, `spatial_compression_ratio`."""
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
        num_frames: int | None = None,
        temb: Tensor | None = None,
        causal: bool | None = None,
        generator: object = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """The frames of raw latents, in [-1, 1].

        Args:
            z: for image families also `[B, C, Hz, Wz]`, which gives images `[B, 3, H, W]`.
            num_frames: for clips whose latents follow each other as images, `[BT, C, Hz, Wz]`: T. Each clip is decoded
                at once, as the family's class does, and the frames `[BT, 3, H, W]` follow each other too.
            timestep, temb: for a decoder that follows timesteps; others were made for one and ignore it.
            causal: if given, must match the decoder.
            generator: ignored: nothing is drawn.
        Raises:
            SpecError: latents of another shape, another `causal`, or images without `num_frames` for a decoder that
                sees whole clips.
            DecodeError: no plan fits `max_memory_bytes`, or frames that are not finite.
        """
        spec = self._own_decoder.spec
        if num_frames is not None and z.ndim == 4:
            frames = self._decode_clips(z, num_frames)
            return DecoderOutput(sample=frames) if return_dict else (frames,)
        are_images = z.ndim == 4 and spec.temporal_factor == 1
        if are_images and spec.sees_whole_clip:
            raise SpecError("this decoder sees whole clips: say how many latents are one with num_frames")
        z = z.unsqueeze(2) if are_images else z
        if causal is not None and causal != spec.is_causal:
            raise SpecError(f"causal is {causal}, but this decoder was made with {spec.is_causal}: leave it out")
        timestep = temb if timestep is None else timestep
        if self._decoder_at is not None and timestep is not None:
            times = timestep.flatten().tolist() * (z.shape[0] if timestep.numel() == 1 else 1)
            frames = torch.cat([self._at(time)._decode(part) for time, part in zip(times, z.split(1), strict=True)])
        else:
            frames = torch.cat([self._decode(part) for part in z.split(1)]) if self.use_slicing else self._decode(z)
        frames = frames.squeeze(2) if are_images else frames
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def _decode_clips(self, z: Float[Tensor, "BT C Hz Wz"], num_frames: int) -> Float[Tensor, "BT 3 H W"]:
        """Clips whose latents follow each other; each as one, however long."""
        if num_frames < 1 or z.shape[0] % num_frames:
            raise SpecError(f"{z.shape[0]} latents are no clips of {num_frames} frames")
        clips = z.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, C, T, Hz, Wz]
        runtime = self._runtime(whole_clip=self._own_decoder.spec.sees_whole_clip)
        frames = decode_in_memory(runtime, clips, warnings.warn)
        return frames.transpose(1, 2).flatten(0, 1)

    def forward(
        self, sample: Float[Tensor, "B 3 F H W"], return_dict: bool = True, num_frames: int | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode (the mean of the posterior) and decode. `num_frames` as `decode` takes it."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict, num_frames=num_frames)

    @property
    def _own_decoder(self) -> Decoder:
        return cast(Decoder, self.decoder)

    def _at(self, time: float) -> AutoencoderFlash:
        if time != self._own_decoder.spec.decode_timestep:
            assert self._decoder_at is not None
            self.decoder = cast_decoder(self._decoder_at(time).to(self.device), self.dtype)
        return self

    def _decode(self, z: Tensor) -> Tensor:
        return decode_in_memory(self._runtime(), z, warnings.warn)

    def _runtime(self, *, whole_clip: bool = False) -> DecodeRuntime:
        decoder = self._own_decoder
        parameter = next(decoder.parameters())
        tiles = self.use_tiling and split_addresses(decoder.spec)
        tile = max(self._tile_pixels // decoder.spec.spatial_factor, 1) if tiles else None
        settings = DecodeSettings(
            chunk=self.chunk,
            tile=tile,
            compile=self.compiles,
            max_memory_bytes=self.max_memory_bytes,
            whole_clip=whole_clip,
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

        Strides are for the encoder alone: these tiles overlap by what their frames depend on. A decoder whose norms
        span whole frames up to its last block decodes whole frames all the same, and a warning says so.
        """
        if not split_addresses(self._own_decoder.spec):
            warnings.warn(
                "enable_tiling: this decoder normalises whole frames up to its last block, so tiles would give other "
                "pixels. It decodes whole frames; set max_memory to be told where that takes too much memory",
                stacklevel=2,
            )
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
        """As diffusers does, adding the file that `trust_remote_code` reads."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CODE_NAME).write_text(CODE, encoding="utf-8")

    def flash_artifact(self) -> tuple[ArtifactHeader, Decoder]:
        """The decoder with plain operators, and its header."""
        return flash_header(self._internal_dict, FLASH_CLASS), plain_decoder(self._own_decoder)


def _empty_base(base_class: str, base_config: Mapping[str, Any], *, has_encoder: bool) -> nn.Module:
    """A model of the family's class without a decoder, its weights not yet loaded."""
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
    """A VAE that shares all modules with the given one, but has no decoder."""
    base = copy.copy(vae)
    base._modules = dict(vae._modules)
    _drop(base, _DECODER_PARTS)
    return base


def _drop(vae: nn.Module, parts: tuple[str, ...]) -> None:
    for part in parts:
        if part in vae._modules:
            vae._modules[part] = nn.Identity()
