"""What a diffusers configuration says about the weights beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flashvaed_cli.artifact.foreign import CONFIG_NAME, ForeignWeights
from flashvaed_cli.artifact.layouts import Role
from flashvaed_cli.artifact.ltx_keys import MEAN_NAMES, STD_NAMES
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.family import Family
from flashvaed_cli.decoders.layer_spec import block_in_width, block_out_width
from flashvaed_cli.decoders.spec import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.errors import ArtifactError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def latent_statistics(
    weights: ForeignWeights, family: Family, specs: Mapping[Role, CoderSpec], location: str
) -> Statistics:
    """Mean and standard deviation per latent channel.

    From the diffusers configuration, else from tensors of the file, else from `latents_mean` and `latents_std` in the
    metadata of the safetensors file (JSON lists), else those of the family's release. A `scaling_factor` of the
    configuration divides the deviations.

    Raises:
        ArtifactError: not one positive figure per latent channel.
    """
    latent_width = _latent_width(specs)
    source, mean, std = f"the {family.name} release", family.latent_mean, family.latent_std
    config = weights.config or {}
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        source, mean, std = CONFIG_NAME, config["latents_mean"], config["latents_std"]
    elif (found := _tensor_statistics(weights.tensors)) is not None:
        source, mean, std = "the file", *found
    elif "latents_mean" in weights.metadata and "latents_std" in weights.metadata:
        source = "its metadata"
        mean, std = (_parsed(weights.metadata[key], key, location) for key in ("latents_mean", "latents_std"))
    if len(mean) != latent_width or len(std) != latent_width or min(std, default=0) <= 0:
        raise ArtifactError(
            f"{location}: latents_mean and latents_std of {source} have {len(mean)} and {len(std)} figures; expected "
            f"{latent_width} each, as the weights have latent channels, and positive deviations. "
            f"Put the right ones into a {CONFIG_NAME} beside the weights."
        )
    scaling = float(config.get("scaling_factor") or 1.0)
    return tuple(map(float, mean)), tuple(float(value) / scaling for value in std)


def _tensor_statistics(tensors: Mapping[str, Tensor]) -> tuple[list[float], list[float]] | None:
    """Mean and deviation where a family keeps them among the weights."""
    mean = next((tensors[name] for name in MEAN_NAMES if name in tensors), None)
    std = next((tensors[name] for name in STD_NAMES if name in tensors), None)
    return None if mean is None or std is None else (mean.flatten().tolist(), std.flatten().tolist())


def configuration(weights: ForeignWeights) -> dict[str, Any]:
    """What is said of the weights beside them: the diffusers configuration, or the JSON that LTX's own files carry in
    their metadata (key `config`, there under `vae`); `decode_timestep` of the metadata wins."""
    config = dict(weights.config or {})
    if not config and "config" in weights.metadata:
        try:
            found = json.loads(weights.metadata["config"])
        except ValueError:
            found = None  # a note of another program
        if isinstance(found, dict):
            config = dict(found.get("vae", found)) if isinstance(found.get("vae", found), dict) else {}
    if "decode_timestep" in weights.metadata:
        config["decode_timestep"] = float(weights.metadata["decode_timestep"])
    return config


def _latent_width(specs: Mapping[Role, CoderSpec]) -> int:
    return next(spec.latent_width for spec in specs.values() if isinstance(spec, DecoderSpec | EncoderSpec))


def _parsed(text: str, key: str, location: str) -> list[float]:
    try:
        return [float(value) for value in json.loads(text)]
    except (ValueError, TypeError):
        raise ArtifactError(f"{location}: {key} in its metadata is no list of numbers: {text:.80}") from None


def check_widths(config: Mapping[str, Any], specs: Mapping[Role, CoderSpec], location: str) -> None:
    """Check the widths in the weights against the configuration of the folder they are in.

    Raises:
        ArtifactError: they differ; names the first layer.
    """
    base_width, latent_width = config.get("base_dim"), config.get("z_dim")
    if base_width is None or latent_width is None:
        return
    for role, spec in specs.items():
        family = get_family(spec.family)
        key = "decoder_base_dim" if role == "decoder" and config.get("decoder_base_dim") else "base_dim"
        build = family.decoder_spec if role == "decoder" else family.encoder_spec
        promised = dict(build(config[key], latent_width).blocks())
        for address, block in spec.blocks():
            expected = block_in_width(promised[address]), block_out_width(promised[address])
            found = block_in_width(block), block_out_width(block)
            if expected != found:
                raise ArtifactError(
                    f"{location}: {CONFIG_NAME} says {key} {config[key]} and z_dim {latent_width}, so "
                    f"{_arrow(expected)} channels in {role} {address}; the weights have {_arrow(found)}. "
                    "If the weights are right (a pruned decoder), give the weights file itself instead of the folder."
                )


def _arrow(widths: tuple[int, int]) -> str:
    return f"{widths[0]} -> {widths[1]}"
