"""`flashvaed.accelerate`: a diffusers pipeline that decodes with another decoder, until that is undone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from flashvaed_cli.api.vae import num_bytes
from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, in_memory_checkpoint, load_checkpoint
from flashvaed_cli.artifact.foreign.coders import shapes_of
from flashvaed_cli.artifact.foreign.configuration import latent_statistics
from flashvaed_cli.artifact.foreign.recognition import recognise
from flashvaed_cli.artifact.foreign.weights import ForeignWeights
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.families.registry import LAYOUTS, are_one_network, get_family
from flashvaed_cli.zoo.builtin import BUILTINS

if TYPE_CHECKING:
    from flashvaed_cli.api.diffusers_vae import AutoencoderFlash

_PLACE = "pipe.vae"
_STATISTICS_BOUND = 1e-3  # of a deviation: what bfloat16 buffers round


class Acceleration:
    """What `accelerate` did to a pipeline; `undo` restores it. As a context manager it undoes at the end.

        with flashvaed.accelerate(pipe, "flash.safetensors"):
            fast = pipe(prompt)
        slow = pipe(prompt)

    Attributes:
        vae: the model that decodes now.
        original: the one that did before.
    """

    def __init__(self, pipe: Any, vae: AutoencoderFlash, original: nn.Module) -> None:
        self.pipe, self.vae, self.original = pipe, vae, original
        self._is_undone = False

    def undo(self) -> None:
        """Give the pipeline its own VAE again, where the other is now and in its dtype. Twice does nothing."""
        if self._is_undone:
            return
        self._is_undone = True
        if self.pipe.vae is not self.vae:
            raise FlashVaedError("pipe.vae was changed since accelerate, so its old VAE was not restored")
        device, dtype, hooked = self.vae.device, self.vae.dtype, _is_offloaded(self.pipe)
        _remove_hooks(self.vae)
        nn.Module.to(self.original, device=device, dtype=dtype)
        _put(self.pipe, self.original, offloads=hooked)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(
    pipe: Any,
    decoder: str | Path | None = None,
    *,
    exact: bool = False,
    chunk: int | None = None,
    max_memory: str | int | None = None,
    compile: bool = False,
) -> Acceleration:
    """Make a diffusers pipeline decode with a Flash decoder, or with its own in exact operators.

        pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
        flashvaed.accelerate(pipe, "flash.safetensors")    # pipe(...) as always
        flashvaed.accelerate(pipe, exact=True)             # or: the same frames, faster

    The encoder, the configuration, the device and the dtype stay the pipeline's. Tiling, slicing and
    `enable_model_cpu_offload` work as before; `enable_sequential_cpu_offload` does not. A pipeline that is
    accelerated already is restored first. `pipe.save_pretrained` writes a folder that loads where flashvaed is
    installed.

    Args:
        pipe: a pipeline with a VAE of a family that flashvaed reads.
        decoder: an artifact of that family, or any other location that `load` takes.
        exact: keep the pipeline's decoder, and run it with operators that give the same frames faster.
        chunk: latent frames per step; None: 1, which takes the least memory (all of a decoder that sees frames ahead).
        max_memory: limit of the predicted peak of decoding, such as "8GiB", or bytes.
        compile: decode with `torch.compile`; every size compiles once, at its first use (minutes).
    Raises:
        FlashVaedError: diffusers is not installed, the pipeline's VAE is of another family or has other latent
            statistics, or neither or both of `decoder` and `exact` are given.
        ArtifactError: the decoder cannot be loaded.
    """
    model = _flash_class()
    if (decoder is None) == (not exact):
        raise FlashVaedError("give accelerate either a decoder or exact=True")
    old = _vae_of(pipe)
    undone = getattr(old, "acceleration", None)
    if isinstance(undone, Acceleration):
        undone.undo()
        old = _vae_of(pipe)
    hooked = _is_offloaded(pipe)
    _remove_hooks(old)
    _require_weights(old)
    given, base = _as_given(old, model), old.base if isinstance(old, model) else old
    if decoder is None:
        checkpoint = in_memory_checkpoint(given, _PLACE)
    else:
        checkpoint = load_checkpoint(decoder, builtins=BUILTINS)
        _require_same_latents(checkpoint, given, cast(nn.Module, base))
    parameter = next(old.parameters())
    own = cast_decoder(checkpoint.require_decoder().to(parameter.device), parameter.dtype)
    vae = model.replacing(old, own, derived_header(checkpoint))
    vae.chunk = vae.chunk if chunk is None else chunk
    vae.max_memory_bytes, vae.compiles = num_bytes(max_memory), compile
    if exact and own.spec.decode_timestep is not None and not isinstance(old, model):
        vae.follow_timesteps(_decoder_at(given))
    acceleration = Acceleration(pipe, vae, old)
    object.__setattr__(vae, "acceleration", acceleration)
    _carry_over(base, vae)
    _put(pipe, vae, offloads=hooked)
    return acceleration


def _flash_class() -> type[AutoencoderFlash]:
    if importlib.util.find_spec("diffusers") is None:
        raise FlashVaedError("accelerate needs diffusers, which is not installed: pip install 'flashvaed[diffusers]'")
    from flashvaed_cli.api.diffusers_vae import AutoencoderFlash

    return AutoencoderFlash


def _vae_of(pipe: Any) -> nn.Module:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module):
        raise FlashVaedError(
            f"{type(pipe).__name__} has no model as vae ({type(vae).__name__}). Give a pipeline that is loaded."
        )
    return vae


def _require_weights(vae: nn.Module) -> None:
    if any(parameter.is_meta for parameter in vae.parameters()):
        raise FlashVaedError(
            f"{_PLACE} has its weights on the meta device, as after enable_sequential_cpu_offload. "
            "Use enable_model_cpu_offload, which works with this decoder."
        )


def _as_given(vae: nn.Module, model: type[AutoencoderFlash]) -> ForeignWeights:
    """The tensors and the configuration of a pipeline's VAE.

    Raises:
        FlashVaedError: its class is of no family that this version reads.
    """
    known = {layout.config_class for layout in LAYOUTS.values() if layout.config_class is not None}
    names = [kind.__name__ for kind in type(vae).__mro__ if kind.__name__ in known]
    if not names and not isinstance(vae, model):
        raise FlashVaedError(f"{_PLACE} is of the class {type(vae).__name__}; this version reads {_listed(known)}.")
    name = type(vae).__name__ if not names else names[0]
    config = {**cast(Mapping[str, Any], vae.config), "_class_name": name}
    return ForeignWeights(vae.state_dict(), (), config, whole_folder=bool(names))


def _require_same_latents(checkpoint: Checkpoint, given: ForeignWeights, base: nn.Module) -> None:
    """Raise FlashVaedError unless a decoder is for the latents of the pipeline."""
    assert given.config is not None
    if "flash" in given.config:
        family = get_family(given.config["flash"]["family"])
    else:
        class_name = given.config["_class_name"]
        shapes = shapes_of(given.tensors)
        layout = recognise(shapes, _PLACE, config_class=class_name, config=given.config)
        family = get_family(layout.family)
    own, spec = get_family(checkpoint.family), checkpoint.require_decoder().spec
    if family.name != own.name and not are_one_network(family, own):
        raise FlashVaedError(
            f"{checkpoint.location} is a decoder of {own.name}, and {_PLACE} is of {family.name}. "
            "Give a decoder that was made from the pipeline's own VAE."
        )
    buffers: dict[str, Tensor] = dict(base.named_buffers())
    weights = ForeignWeights(buffers, (), cast(Mapping[str, Any], base.config))
    theirs = latent_statistics(weights, family, {"decoder": spec}, _PLACE)
    ours = checkpoint.require_statistics()
    deviation = torch.tensor(ours[1])
    for name, one, other in zip(("latents_mean", "latents_std"), ours, theirs, strict=True):
        apart = (torch.tensor(one) - torch.tensor(other)).abs() / deviation
        if float(apart.max()) > _STATISTICS_BOUND:
            channel = int(apart.argmax())
            raise FlashVaedError(
                f"{name} of channel {channel} is {one[channel]:.4g} in {checkpoint.location} and {other[channel]:.4g} "
                f"in {_PLACE}: their latents differ. Give a decoder that was made from the pipeline's own VAE."
            )


def _decoder_at(given: ForeignWeights) -> Callable[[float], Decoder]:
    """The pipeline's decoder for a timestep; norms are folded again for each."""
    assert given.config is not None
    config = dict(given.config)

    def build(timestep: float) -> Decoder:
        weights = ForeignWeights(given.tensors, (), {**config, "decode_timestep": timestep}, whole_folder=True)
        return in_memory_checkpoint(weights, _PLACE).require_decoder()

    return build


def _carry_over(old: nn.Module | Tensor, vae: AutoencoderFlash) -> None:
    """Tiling and slicing as they were."""
    if getattr(old, "use_tiling", False):
        vae.enable_tiling(getattr(old, "tile_sample_min_height", None), getattr(old, "tile_sample_min_width", None))
    if getattr(old, "use_slicing", False):
        vae.enable_slicing()


def _is_offloaded(pipe: Any) -> bool:
    return bool(getattr(pipe, "_all_hooks", None))


def _remove_hooks(vae: nn.Module) -> None:
    if hasattr(vae, "_hf_hook"):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(vae, recurse=True)


def _put(pipe: Any, vae: nn.Module, *, offloads: bool) -> None:
    """Set the VAE of a pipeline, in its configuration too, and renew its offload."""
    if hasattr(pipe, "register_modules"):
        pipe.register_modules(vae=vae)
    else:
        pipe.vae = vae
    if offloads:
        pipe.enable_model_cpu_offload(device=pipe._offload_device)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
