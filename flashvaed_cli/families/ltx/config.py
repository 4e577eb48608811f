"""What configurations of LTX VAEs say and shapes do not show: how frames are padded, residuals, the timestep.

Knows the names of diffusers (`AutoencoderKLLTXVideo`, `AutoencoderKLLTX2Video`) and those of LTX's own files. Decoders
are listed from the frames back to the latents there, so their lists are read from the end.

Reference: the configurations of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.blocks import (
    BlockSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    StridedDownsampleSpec,
    UnshuffleDownsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, SpacePadding, TimePadding
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.family import ConfigKeys, Contradiction

SpecT = TypeVar("SpecT", bound=CoderSpec)

_SPACE_PADDINGS: tuple[SpacePadding, ...] = ("zeros", "reflect")

SEPARABLE_CAUSAL = "separable_causal"
"""Whether a student's depthwise layers pad causally, as those of the released Flash-VAED student of LTX do."""

_FOLDS = {(1, 2, 2): "spatial", (2, 1, 1): "temporal", (2, 2, 2): "spatiotemporal"}
_OWN_FACTORS = {(1, 2, 2): "compress_space", (2, 1, 1): "compress_time", (2, 2, 2): "compress_all"}
# diffusers assumes this if a configuration does not say; LTX's own code takes every decoder as centred.
_CAUSAL_UNLESS_SAID = "AutoencoderKLLTX2Video"


def with_time_padding(spec: SpecT, padding: TimePadding) -> SpecT:
    """The spec with other padding for every kernel that spans frames: the same weights, other frames."""
    return _with_layers(spec, {"time_padding": padding}, lambda layer: layer.kernel[0] > 1)


def separable_padding(config: Mapping[str, Any]) -> TimePadding | None:
    """How depthwise-separable layers pad in time, if a configuration says so; None: as dense ones do.

    Raises:
        SpecError: a value that is not supported.
    """
    if config.get(SEPARABLE_CAUSAL) is None:
        return None
    return "first" if _flag(config, SEPARABLE_CAUSAL) else "edges"


def with_space_padding(spec: SpecT, padding: SpacePadding) -> SpecT:
    """The spec with other padding for every kernel that spans pixels."""
    return _with_layers(spec, {"space_padding": padding}, lambda layer: layer.kernel[1:] != (1, 1))


def _with_layers(spec: SpecT, update: dict[str, Any], applies: Callable[[ConvSpec], bool]) -> SpecT:
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        layers = {name: layer for name, layer in block.layers.items() if applies(layer)}
        changed[address] = block.model_copy(
            update={name: layer.model_copy(update=update) for name, layer in layers.items()}
        )
    return cast(SpecT, spec.with_blocks(changed))


def configured(spec: SpecT, config: Mapping[str, Any]) -> SpecT:
    """The original's spec with what a checkpoint's configuration says and its shapes do not show.

    Raises:
        SpecError: a value that is not supported, or blocks other than this version's; names the key.
    """
    role = spec.role
    causal = _flag(config, f"{role}_causal", *(("causal_decoder",) if role == "decoder" else ()))
    if causal is None and role == "decoder" and config.get("_class_name") == _CAUSAL_UNLESS_SAID:
        causal = True
    if causal is not None:
        spec = with_time_padding(spec, "first" if causal else "edges")
    in_space = _space_padding(config, f"{role}_spatial_padding_mode", "spatial_padding_mode")
    if in_space is not None:
        spec = with_space_padding(spec, in_space)
    blocks = _own_blocks(spec, config)
    if not isinstance(spec, DecoderSpec):
        return spec
    try:
        spec = _with_residuals(spec, {**_residuals(spec, config), **_own_residuals(spec, blocks)})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(f"upsample_residual does not fit the widths: {reason}") from None
    return cast(SpecT, _at_timestep(spec, config))


def described(spec: CoderSpec) -> dict[str, Any]:
    """The configuration for which `configured` restores what shapes do not show."""
    mirrors = any(layer.space_padding == "reflect" for _, layer in spec.layers())
    in_space = "reflect" if mirrors else "zeros"
    if not isinstance(spec, DecoderSpec):
        return {"encoder_causal": spec.is_causal, "encoder_spatial_padding_mode": in_space}
    residual = [any(isinstance(b, ShuffleUpsampleSpec) and b.residual for b in stage.blocks) for stage in _ups(spec)]
    found: dict[str, Any] = {
        "causal_decoder": spec.is_causal,
        "spatial_padding_mode": in_space,
        "upsample_residual": residual[::-1],
        "timestep_conditioning": spec.decode_timestep is not None,
    }
    separable = {layer.time_padding for _, layer in spec.layers() if layer.operator == "dwsep3d"}
    if separable == {"first"} and not spec.is_causal:
        found[SEPARABLE_CAUSAL] = True
    return found if spec.decode_timestep is None else {**found, "decode_timestep": spec.decode_timestep}


def contradictions(spec: CoderSpec, config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Where a configuration contradicts the tensors about noise that the decoder adds."""
    if not isinstance(spec, DecoderSpec):
        return
    noise = [any(isinstance(b, ResBlockSpec) and b.noise for b in stage.blocks) for stage in spec.stages[1:-1]]
    said = config.get("decoder_inject_noise")
    if said is not None:
        flags = [said] * len(noise) if isinstance(said, bool) else list(said)[::-1]
        if flags[: len(noise)] != noise:
            yield Contradiction("decoder_inject_noise", said, noise[::-1])
    runs = [params for name, params in reversed(_own_entries(config, "decoder") or []) if name == "res_x"]
    own = [bool(params.get("inject_noise", False)) if isinstance(params, Mapping) else False for params in runs]
    if own and own != noise:
        yield Contradiction("decoder_blocks", f"inject_noise {own[::-1]}", f"inject_noise {noise[::-1]}")


def assumed(spec: CoderSpec, config: Mapping[str, Any]) -> str | None:
    """The assumption about padding if no configuration says: a class has defaults, bare weights have none."""
    causal = config.get("decoder_causal", config.get("causal_decoder"))
    if not isinstance(spec, DecoderSpec) or causal is not None or "_class_name" in config:
        return None
    mirrors = any(layer.space_padding == "reflect" for _, layer in spec.layers())
    taken = "centred in time (decoder_causal false)" + (" and mirrored at the borders" if mirrors else "")
    return (
        f"nothing in it says how its decoder pads frames: it is assumed to be {taken}, as released ones "
        'are. If yours is causal, put it into a folder with a config.json of {"decoder_causal": true} and give the '
        "folder"
    )


def config_keys(
    decoder: DecoderSpec, encoder: CoderSpec, widths: Mapping[str, tuple[int, ...]], *, entry_is_latent: bool = False
) -> ConfigKeys:
    """The keys and values that configurations of a version may have.

    Args:
        decoder, encoder: the originals.
        widths: the multiples of the base width that `decoder_block_out_channels` and `block_out_channels` list.
        entry_is_latent: see `ConfigKeys`.
    """
    folds = [block for _, block in encoder.blocks() if isinstance(block, UnshuffleDownsampleSpec)]
    downs, ups = [stage for stage in encoder.stages if stage.name.startswith("down")], _ups(decoder)
    factors = [[b.conv.in_width // b.out_width for b in s.blocks if isinstance(b, ShuffleUpsampleSpec)] for s in ups]
    fixed: dict[str, tuple[Any, ...]] = {
        "in_channels": (3,),
        "out_channels": (3,),
        "patch_size": (decoder.patch,),
        "patch_size_t": (1,),
        "resnet_norm_eps": (1e-6,),
        "layers_per_block": (tuple(_num_plain(stage) for stage in encoder.stages[1:-1]),),
        "decoder_layers_per_block": (tuple(_num_plain(stage) for stage in decoder.stages[-2:0:-1]),),
        "spatio_temporal_scaling": (tuple(_is_sampled(stage) for stage in downs),),
        "decoder_spatio_temporal_scaling": (tuple(map(bool, factors))[::-1],),
        "upsample_factor": (tuple(found[0] if found else 1 for found in factors)[::-1],),
        "upsample_type": (_upsample_types(ups),),
        "down_block_types": tuple((name,) * len(downs) for name in _DOWN_BLOCKS[bool(folds)]),
        "spatial_compression_ratio": (None, decoder.spatial_factor),
        "temporal_compression_ratio": (None, decoder.temporal_factor),
        **_OWN_FIXED,
    }
    if folds:
        fixed["downsample_type"] = (tuple(_FOLDS[block.factor] for block in folds),)
    return ConfigKeys(
        fixed=fixed,
        read=_READ,
        idle=_IDLE,
        latent_key="latent_channels",
        widths={
            "decoder": (("decoder_block_out_channels", widths["decoder"]),),
            "encoder": (("block_out_channels", widths["encoder"]),),
        },
        contradictions=contradictions,
        separable_padding=separable_padding,
        assumed=assumed,
        entry_is_latent=entry_is_latent,
        in_metadata=True,
    )


def _upsample_types(ups: Sequence[StageSpec]) -> tuple[str, ...]:
    """In forward order, unlike the decoder's other lists."""
    blocks = (next((b for b in stage.blocks if isinstance(b, ShuffleUpsampleSpec)), None) for stage in ups)
    return tuple("spatiotemporal" if block is None else _FOLDS[block.factor] for block in blocks)


_DOWN_BLOCKS = {False: ("LTXVideoDownBlock3D",), True: ("LTXVideo095DownBlock3D", "LTX2VideoDownBlock3D")}
_OWN_FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (3,),
    "norm_layer": ("pixel_norm",),
    "latent_log_var": ("uniform",),
    "use_quant_conv": (False,),
    "normalize_latent_channels": (False,),
}
# Shapes show the widths; pipelines mix this noise into latents before they decode.
_IDLE = frozenset(
    {"downsample_type", "dropout", "double_z", "encoder_base_channels", "decoder_base_channels", "decode_noise_scale"}
)
_READ = frozenset(
    {
        "encoder_causal",
        "decoder_causal",
        "causal_decoder",
        SEPARABLE_CAUSAL,
        "spatial_padding_mode",
        "encoder_spatial_padding_mode",
        "decoder_spatial_padding_mode",
        "upsample_residual",
        "timestep_conditioning",
        "decode_timestep",
        "decoder_inject_noise",
        "blocks",
        "encoder_blocks",
        "decoder_blocks",
    }
)


def _flag(config: Mapping[str, Any], *keys: str) -> bool | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool):
            return value
        if value is not None:
            raise SpecError(f"{key} is {value!r}; supported: true, false")
    return None


def _space_padding(config: Mapping[str, Any], *keys: str) -> SpacePadding | None:
    """The first value given; all values given must be supported."""
    said = {key: value for key in keys if (value := config.get(key)) is not None}
    for key, value in said.items():
        if value not in _SPACE_PADDINGS:
            raise SpecError(f"{key} is {value!r}; supported: {', '.join(_SPACE_PADDINGS)}")
    return next(iter(said.values()), None)


def _at_timestep(spec: DecoderSpec, config: Mapping[str, Any]) -> DecoderSpec:
    conditioned, said = spec.decode_timestep is not None, _flag(config, "timestep_conditioning")
    if said is not None and said != conditioned:
        found = "are" if conditioned else "are not"
        raise SpecError(
            f"timestep_conditioning is {str(said).lower()}, but the norms of this decoder, by its tensors "
            f"{spec.family}, {found} conditioned on a timestep"
        )
    timestep = config.get("decode_timestep")
    if timestep is None or not conditioned:
        return spec
    return spec.model_copy(update={"decode_timestep": float(timestep)})


def _ups(spec: DecoderSpec) -> list[StageSpec]:
    return [stage for stage in spec.stages if stage.name.startswith("up")]


def _residuals(spec: DecoderSpec, config: Mapping[str, Any]) -> dict[str, bool]:
    """`upsample_residual` of diffusers, by stage: one flag per stage, or one for all."""
    said, stages = config.get("upsample_residual"), _ups(spec)
    if said is None:
        return {}
    flags = [said] * len(stages) if isinstance(said, bool) else said
    if not isinstance(flags, Sequence) or len(flags) < len(stages) or not all(isinstance(f, bool) for f in flags):
        raise SpecError(f"upsample_residual is {said!r}; supported: true, false or {len(stages)} of them")
    return {stage.name: flag for stage, flag in zip(stages, reversed(flags), strict=False)}


def _own_residuals(spec: DecoderSpec, entries: Sequence[tuple[str, Any]]) -> dict[str, bool]:
    """`residual` of the entries that enlarge, by stage."""
    flags = [
        isinstance(params, Mapping) and bool(params.get("residual")) for name, params in entries if "compress" in name
    ]
    stages = [stage.name for stage in _ups(spec) if _is_sampled(stage)]
    return dict(zip(stages, flags, strict=True)) if entries else {}


def _with_residuals(spec: DecoderSpec, residual: Mapping[str, bool]) -> DecoderSpec:
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        stage = stage_of(address)
        if isinstance(block, ShuffleUpsampleSpec) and stage in residual:
            changed[address] = ShuffleUpsampleSpec(**{**dict(block), "residual": residual[stage]})
    return spec.with_blocks(changed)


def _own_entries(config: Mapping[str, Any], role: str) -> list[tuple[str, Any]] | None:
    """The blocks in LTX's own configuration: name, and number of layers or parameters; None: there is no list."""
    key = f"{role}_blocks" if f"{role}_blocks" in config else "blocks"
    entries = config.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list | tuple) or not all(isinstance(e, list | tuple) and len(e) == 2 for e in entries):
        raise SpecError(f"{key} is {str(entries)[:80]!r}; supported: a list of [name, parameters]")
    return [(str(name), params) for name, params in entries]


def _own_blocks(spec: CoderSpec, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The entries of a role in the order in which they run; empty if the configuration lists none.

    Raises:
        SpecError: they are not this version's blocks.
    """
    entries = _own_entries(config, spec.role)
    if entries is None:
        return []
    if spec.role == "decoder":
        entries.reverse()
    said = [
        _with_number(name, params.get("num_layers") if isinstance(params, Mapping) else params)
        for name, params in entries
    ]
    expected = list(_block_names(spec))
    if said != expected:
        key = f"{spec.role}_blocks" if f"{spec.role}_blocks" in config else "blocks"
        raise SpecError(f"{key} run as {', '.join(said)}; supported for {spec.family}: {', '.join(expected)}")
    return entries


def _with_number(name: str, number: object) -> str:
    return f"{name} {number}" if name == "res_x" else name


def _block_names(spec: CoderSpec) -> Iterator[str]:
    """LTX's own names for the blocks between entry and head, in forward order, runs of residual blocks as one."""
    for stage in spec.stages[1:-1]:
        run = 0
        for block in stage.blocks:
            if isinstance(block, ResBlockSpec) and block.shortcut is None:
                run += 1
                continue
            if run:
                yield _with_number("res_x", run)
            run = 0
            if isinstance(block, ResBlockSpec):
                yield "res_x_y"
            elif isinstance(block, UnshuffleDownsampleSpec):
                yield f"{_OWN_FACTORS[block.factor]}_res"
            elif isinstance(block, ShuffleUpsampleSpec | StridedDownsampleSpec):
                yield _OWN_FACTORS[block.factor]
        if run:
            yield _with_number("res_x", run)


def _num_plain(stage: StageSpec) -> int:
    return sum(isinstance(block, ResBlockSpec) and block.shortcut is None for block in stage.blocks)


def _is_sampled(stage: StageSpec) -> bool:
    samplers = ShuffleUpsampleSpec | StridedDownsampleSpec | UnshuffleDownsampleSpec
    return any(isinstance(block, samplers) for block in stage.blocks)
