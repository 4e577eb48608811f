"""The decoders of a speed table, each as it would be run: diffusers' own, ours plain, the exact twins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.families.registry import FAMILIES, class_layout, get_family, original_like
from flashvaed_cli.families.uniform_layout import fits_uniform_layout
from flashvaed_cli.metrics.autotune import Choice
from flashvaed_cli.stages.common.memory_fit import Limits

Latents = Float[Tensor, "1 C T Hz Wz"]
Call = Callable[[], object]

PLAIN_EAGER = Choice("contiguous", exact=False)


def own_call(decoder: Decoder, latents: Latents, choice: Choice, limits: Limits) -> Call:
    """A call of our decoder, prepared in the chosen way.

    Args:
        decoder: with plain operators.
        latents: raw, in the dtype and on the device of the run.
        limits: from `fit_to_memory`; they hold the chunk.
    Raises:
        DecodeError: it is to be compiled, and this machine has no compiler.
    """
    chosen = exact_decoder(decoder, device_type=latents.device.type) if choice.exact else decoder
    settings = DecodeSettings(
        chunk=limits.chunk,
        tile=limits.tile,
        dtype=latents.dtype,
        memory_format=choice.memory_format,
        compile=choice.compile,
        max_memory_bytes=limits.max_memory_bytes,
    )
    runtime = DecodeRuntime(chosen, settings)
    return lambda: runtime.decode(latents)


def diffusers_fault(decoder: Decoder) -> str | None:
    """Why diffusers cannot run a decoder; None if it can."""
    if get_family(decoder.spec.family).elsewhere.diffusers_arguments is None:
        compared = [name for name, family in FAMILIES.items() if family.elsewhere.diffusers_arguments is not None]
        return f"the comparison knows diffusers' decoders of {', '.join(compared)}, not of {decoder.spec.family}"
    fit = fits_uniform_layout(decoder.spec, original_like(decoder.spec))
    if fit.base_width is None:
        return f"diffusers has no decoder like it ({fit.deviation})"
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed (pip install 'flashvaed[diffusers]')"
    return None


def diffusers_call(decoder: Decoder, latents: Latents, *, compiled: bool = False) -> Call:
    """A call of diffusers' model with the decoder's weights, unchanged, one latent frame at a time.

    Args:
        decoder: one with `diffusers_fault` None.
        latents: raw, in the dtype and on the device of the run.
        compiled: `torch.compile` of its decoder, which compiles for each number of frames that its caches hold.
    """
    vae = _diffusers_vae(decoder)
    nn.Module.to(vae, device=latents.device, dtype=latents.dtype)  # diffusers warns about modules that it lacks
    if compiled:
        cast(nn.Module, vae.decoder).compile()
    return lambda: vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]


def _diffusers_vae(decoder: Decoder) -> nn.Module:
    import diffusers

    layout = class_layout(decoder.spec.family)
    arguments = get_family(decoder.spec.family).elsewhere.diffusers_arguments
    fit = fits_uniform_layout(decoder.spec, original_like(decoder.spec))
    assert fit.base_width is not None and arguments is not None
    assert layout is not None and layout.config_class is not None
    build = getattr(diffusers, layout.config_class)
    vae = build(base_dim=fit.base_width, z_dim=decoder.spec.latent_width, **arguments).eval().requires_grad_(False)
    weights = to_foreign(decoder.state_dict(), decoder.spec, layout)
    absent, superfluous = vae.load_state_dict(weights, strict=False)
    assert not superfluous and not any(name.startswith(("decoder.", "post_quant")) for name in absent)
    return vae
