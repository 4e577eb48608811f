"""The config from which diffusers builds a decoder and its encoder, and which files its classes read.

Values come from what the families say about configs (`Family.config_keys`); this file has the names that each class
takes.

Reference: the constructors of diffusers' classes (facts only).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.errors import ExportError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import LAYOUTS, get_family, original_like
from flashvaed_cli.families.uniform_layout import encoder_base_width, fits_uniform_layout

_PADDING = ("encoder_spatial_padding_mode", "decoder_spatial_padding_mode")
ARGUMENTS = {layout.config_class: layout.arguments for layout in LAYOUTS.values() if layout.config_class}
"""What the constructors take, of the keys that the families know."""


def diffusers_config(
    class_name: str,
    decoder: DecoderSpec,
    encoder: EncoderSpec | None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Any]:
    """`config.json` for a decoder, with an encoder that `encoder_fault` accepts; None: weights without an encoder.

    Args:
        statistics: mean and deviation per latent channel.
    Raises:
        ExportError: the class has no config for this decoder, or the statistics are unknown.
    """
    fit = fits_uniform_layout(decoder, original_like(decoder))
    if fit.base_width is None:
        raise ExportError(f"{class_name} has no decoder like this one ({fit.deviation})")
    if not all(statistics):
        raise ExportError("a diffusers model needs latent statistics, and this decoder has none")
    own_width = None if encoder is None else encoder_base_width(encoder)
    known = dict(_known(class_name, decoder, encoder))
    known |= _widths(class_name, get_family(decoder.family), fit.base_width, own_width or fit.base_width)
    known |= {"latents_mean": list(statistics[0]), "latents_std": list(statistics[1])}
    as_factors = _layout_of(class_name).statistics_config
    known |= {} if as_factors is None else as_factors(*statistics)
    _require_takes(class_name, known)
    return {"_class_name": class_name} | {key: known[key] for key in ARGUMENTS[class_name]}


def encoder_fault(class_name: str, decoder: DecoderSpec, encoder: EncoderSpec) -> str | None:
    """Why an encoder cannot be combined with a decoder in one diffusers model; None if it can."""
    base_width, family = encoder_base_width(encoder), get_family(decoder.family)
    if base_width is None or encoder.latent_width != decoder.latent_width:
        return "its encoder is a different network from the original's"
    keys = {_width_key(class_name, family, role)[0] for role in ("encoder", "decoder")}
    needed = fits_uniform_layout(decoder, original_like(decoder)).base_width
    if len(keys) == 1 and needed != base_width:
        return f"{class_name} has one {keys.pop()}, the encoder needs {base_width} and the decoder {needed}"
    if family.config_keys.entry_is_latent and base_width != encoder.latent_width:
        return f"{class_name} begins its encoder with {encoder.latent_width} channels, this one has {base_width}"
    if not set(_PADDING) <= set(ARGUMENTS[class_name]) and _mirrors(encoder):
        return f"{class_name} has no encoder that mirrors frames at their borders"
    return None


def single_file_note(class_name: str | None, decoder: DecoderSpec, encoder: EncoderSpec | None) -> str:
    """Which program reads a file in the original layout, and how."""
    fit = fits_uniform_layout(decoder, original_like(decoder))
    if fit.base_width is None:
        return f"safetensors: no original ({fit.deviation}): other programs need this program's decoder for it"
    family = get_family(decoder.family)
    if class_name is None:
        return f"safetensors: diffusers has no class for {family.name}: programs with the original's own code read it"
    if not family.elsewhere.reads_single_file:
        return f"safetensors: diffusers reads no single file of {family.name}: give it the folder of -t diffusers"
    if encoder is None:
        return f"safetensors: {class_name}.from_single_file wants an encoder in the file: give it that of -t diffusers"
    if (fault := encoder_fault(class_name, decoder, encoder)) is not None:
        return f"safetensors: diffusers does not read it: {fault}"
    base_width = encoder_base_width(encoder)
    if family.elsewhere.tells_by_released_encoder and base_width != family.released_base_width:
        return (
            f"safetensors: diffusers tells single files of {family.name} by an encoder of base width "
            f"{family.released_base_width}, this has {base_width}: give it the folder of -t diffusers"
        )
    return f"safetensors: {class_name}.from_single_file loads it, with config= the folder of -t diffusers"


def _known(class_name: str, decoder: DecoderSpec, encoder: EncoderSpec | None) -> Iterator[tuple[str, Any]]:
    """What the families' keys and the specs say, under every name that any class takes."""
    family = get_family(decoder.family)
    for key, values in family.config_keys.fixed.items():
        yield key, values[0]
    yield family.config_keys.latent_key, decoder.latent_width
    for key in ("spatial_compression_ratio", "scale_factor_spatial"):
        yield key, decoder.spatial_factor
    for key in ("temporal_compression_ratio", "scale_factor_temporal"):
        yield key, decoder.temporal_factor
    yield "scaling_factor", 1.0
    yield from _layout_of(class_name).settings.items()
    yield "downsample_type", family.config_keys.fixed.get("downsample_type", (("conv",) * 4,))[0]
    noise = [any(isinstance(b, ResBlockSpec) and b.noise for b in stage.blocks) for stage in decoder.stages[1:-1]]
    yield "decoder_inject_noise", noise[::-1]
    # The class is built for the encoder, if there is one; otherwise the decoder decides.
    released = family.encoder_spec(family.released_base_width, decoder.latent_width)
    for spec in (released, decoder) if encoder is None else (decoder, encoder):
        yield from family.described(spec).items()
    for role, spec in (("encoder", encoder), ("decoder", decoder)):
        yield f"{role}_causal", spec is None or spec.is_causal
        yield f"{role}_spatial_padding_mode", "reflect" if spec is not None and _mirrors(spec) else "zeros"


def _layout_of(class_name: str) -> Layout:
    return next(layout for layout in LAYOUTS.values() if layout.config_class == class_name)


def _mirrors(spec: CoderSpec) -> bool:
    return any(layer.space_padding == "reflect" for _, layer in spec.layers())


def _width_key(class_name: str, family: Family, role: str) -> tuple[str, tuple[int, ...] | None]:
    return next(entry for entry in family.config_keys.widths[role] if entry[0] in ARGUMENTS[class_name])


def _widths(class_name: str, family: Family, decoder_width: int, encoder_width: int) -> dict[str, Any]:
    widths: dict[str, Any] = {}
    for role, base_width in (("encoder", encoder_width), ("decoder", decoder_width)):
        key, multiples = _width_key(class_name, family, role)
        widths[key] = base_width if multiples is None else [base_width * multiple for multiple in multiples]
    return widths


def _require_takes(class_name: str, known: Mapping[str, Any]) -> None:
    """Raise ExportError if a value cannot be passed to the constructor and is not the only one that it supports."""
    if "decoder_spatial_padding_mode" not in ARGUMENTS[class_name] and known["decoder_spatial_padding_mode"] != "zeros":
        raise ExportError(f"{class_name} has no decoder that mirrors frames at their borders")
