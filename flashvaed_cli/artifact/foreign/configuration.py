"""A checkpoint's configuration, of diffusers beside the weights or in their metadata: read it and check it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flashvaed_cli.artifact.foreign.mismatch import require_float
from flashvaed_cli.artifact.foreign.weights import CONFIG_NAME, ForeignWeights
from flashvaed_cli.artifact.header_checks import check_statistics
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.latent_patches import are_per_place
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Role
from flashvaed_cli.families.registry import LAYOUTS, get_family
from flashvaed_cli.limits import MAX_QUOTED_CHARS, MAX_WIDTH
from flashvaed_cli.untrusted.files import parse_json

_MEAN, _STD = "latents_mean", "latents_std"
_FACTORS = ("scaling_factor", "shift_factor")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def latent_statistics(
    weights: ForeignWeights, family: Family, specs: Mapping[Role, CoderSpec], location: str
) -> Statistics:
    """Mean and standard deviation per latent channel.

    Taken from the diffusers configuration, else from tensors of the file, else from `latents_mean` and `latents_std` in
    the metadata of the safetensors file (JSON lists), else from the family's release. A `scaling_factor` of the
    configuration divides the deviations; for families with factors instead of lists it stands for the deviations, and
    `shift_factor` for the means; where only the shift is given, the deviations are the release's.

    Returns:
        both empty if unknown: latents can then be used in raw scale only.
    Raises:
        ArtifactError: not one figure per latent channel, a deviation that is not positive, or only one of the two.
    """
    latent_width = _latent_width(specs)
    source, mean, std = f"the {family.name} release", family.latent_mean, family.latent_std
    if family.latents_are_raw:
        mean, std = (0.0,) * latent_width, (1.0,) * latent_width
    config = weights.config or {}
    if _has_both(config, CONFIG_NAME, location):
        source, mean, std = CONFIG_NAME, config["latents_mean"], config["latents_std"]
    elif family.config_keys.has_factors and any(config.get(key) is not None for key in _FACTORS):
        shift = 0.0 if config.get("shift_factor") is None else config["shift_factor"]
        mean = _numbers([shift], "shift_factor", CONFIG_NAME, location) * latent_width
        source = CONFIG_NAME
        if config.get("scaling_factor") is not None:
            std = [1.0] * latent_width
    elif (found := _tensor_statistics(weights.tensors, location)) is not None:
        source, mean, std = "the file", *found
    elif _has_both(weights.metadata, "its metadata", location):
        source = "its metadata"
        mean, std = (_parsed(weights.metadata[key], key, location) for key in ("latents_mean", "latents_std"))
    elif not mean and not std:
        return (), ()
    mean, std = (_numbers(row, key, source, location) for row, key in ((mean, _MEAN), (std, _STD)))
    has_patches = any(one.variance_eps is not None for one in LAYOUTS.values() if one.family == family.name)
    fits_patches = has_patches and are_per_place(len(mean), latent_width)
    fitting = len(mean) == len(std) and (len(mean) == latent_width or fits_patches)
    if not fitting or not all(value > 0 for value in std):
        raise ArtifactError(
            f"{location}: latents_mean and latents_std of {source} have {len(mean)} and {len(std)} figures; expected "
            f"{latent_width} each, as the weights have latent channels, and positive deviations. "
            f"Put the right ones into a {CONFIG_NAME} beside the weights."
        )
    scaling = 1.0 if config.get("scaling_factor") is None else config["scaling_factor"]
    (scaling,) = _numbers([scaling], "scaling_factor", CONFIG_NAME, location)
    if scaling <= 0:
        raise ArtifactError(f"{location}: scaling_factor is {scaling:g}; latents are multiplied by a positive number.")
    statistics = tuple(mean), tuple(value / scaling for value in std)
    try:
        check_statistics(*statistics, ())
    except ValueError as error:
        raise ArtifactError(f"{location}: {error}. Put the right figures into a {CONFIG_NAME} beside it.") from error
    return statistics


def _numbers(row: object, key: str, source: str, location: str) -> list[float]:
    """A list of finite numbers. Raises ArtifactError, with the key, if it is anything else."""
    if isinstance(row, list | tuple):
        try:
            numbers = [float(value) for value in row if isinstance(value, int | float) and not isinstance(value, bool)]
        except OverflowError:
            numbers = []
        if len(numbers) == len(row) and all(map(math.isfinite, numbers)):
            return numbers
    if isinstance(row, list) and len(row) == 1:
        row = row[0]
    raise ArtifactError(f"{location}: {key} of {source} is {row!r:.80}; expected finite numbers.")


def _has_both(given: Mapping[str, Any], source: str, location: str) -> bool:
    """Whether `latents_mean` and `latents_std` are given. Raises ArtifactError if only one of them is."""
    there = [key for key in (_MEAN, _STD) if given.get(key) is not None]
    if len(there) == 1:
        raise ArtifactError(f"{location}: {source} has only {there[0]} of latents_mean and latents_std.")
    return bool(there)


def _tensor_statistics(tensors: Mapping[str, Tensor], location: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation among the weights; None if there are none."""
    pairs = [one.statistics for one in LAYOUTS.values() if one.statistics is not None]
    pairs += [pair for one in LAYOUTS.values() for pair in one.other_statistics]
    means, deviations = zip(*dict.fromkeys(pairs), strict=True)
    found = [next((name for name in names if name in tensors), None) for names in (means, deviations)]
    if found[0] is None and found[1] is None:
        return None
    if found[0] is None or found[1] is None:
        absent = (deviations if found[1] is None else means)[0]
        raise ArtifactError(f"{location}: holds {found[0] or found[1]} but not {absent}. Give a whole checkpoint.")
    for name in (found[0], found[1]):
        require_float(name, tensors[name], location)
    mean, second = tensors[found[0]].flatten().tolist(), tensors[found[1]].flatten().double()
    eps = next((one.variance_eps for one in LAYOUTS.values() if one.statistics and one.statistics[1] == found[1]), None)
    return mean, (second if eps is None else (second + eps).sqrt()).tolist()


def configuration(weights: ForeignWeights, family: Family, location: str) -> dict[str, Any]:
    """The configuration that comes with the weights: that of diffusers, or the JSON in the metadata of LTX's own files
    (key `config`, there under `vae`). The former takes precedence, except for `decode_timestep`.

    Raises:
        ArtifactError: a `decode_timestep` that is not a number.
    """
    config: dict[str, Any] = {}
    if family.config_keys.in_metadata and "config" in weights.metadata:
        try:
            found = parse_json(weights.metadata["config"])
        except ValueError:
            found = None  # not ours to read
        if isinstance(found, dict):
            config = dict(found.get("vae", found)) if isinstance(found.get("vae", found), dict) else {}
    if family.config_keys.in_arguments:
        config |= {key: value for key, value in weights.arguments.items() if key in family.config_keys.known}
    config |= weights.config or {}
    timestep = weights.metadata.get("decode_timestep", config.get("decode_timestep"))
    if timestep is not None:
        try:
            config["decode_timestep"] = float(timestep)
            if not math.isfinite(config["decode_timestep"]):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise ArtifactError(f"{location}: decode_timestep is {timestep!r:.40}, which is not a number.") from None
    return config


def _latent_width(specs: Mapping[Role, CoderSpec]) -> int:
    return next(spec.latent_width for spec in specs.values() if isinstance(spec, DecoderSpec | EncoderSpec))


def _parsed(text: str, key: str, location: str) -> list[float]:
    try:
        return [float(value) for value in parse_json(text)]
    except (ValueError, TypeError):
        raise ArtifactError(f"{location}: {key} in its metadata is not a list of numbers: {text:.80}") from None


def check_keys(config: Mapping[str, Any], specs: Mapping[Role, CoderSpec], location: str) -> tuple[str, ...]:
    """Check that a configuration is for the network that the weights are read as.

    Returns:
        keys that this version does not know.
    Raises:
        ArtifactError: values that the family does not have, or that the tensors contradict; names all of them.
    """
    spec = next(iter(specs.values()))
    family = get_family(spec.family)
    keys, faults = family.config_keys, []
    for key, supported in keys.fixed.items():
        if key in config and not any(_agrees(key, config[key], value) for value in supported):
            values = " or ".join(_shown(value) for value in supported)
            faults.append(f"{key} is {_shown(config[key])}; supported for {family.name}: {values}")
    latent_width = _latent_width(specs)
    if config.get(keys.latent_key) not in (None, latent_width):
        faults.append(f"{keys.latent_key} is {config[keys.latent_key]!r:.40}; the weights have {latent_width}")
    for spec in specs.values():
        for key, said, found in keys.contradictions(spec, config):
            faults.append(f"{key} is {_shown(said)}; the weights have {_shown(found)}")
    faults = list(dict.fromkeys(faults))  # encoder and decoder may have the same
    if faults:
        raise ArtifactError(
            f"{location}: its configuration does not fit {family.name}, the family of its tensors' names: "
            f"{'; '.join(faults)}."
        )
    known = keys.known | {"latents_mean", "latents_std", "scaling_factor"}
    return tuple(key for key in config if key not in known and not key.startswith("_"))


def _agrees(key: str, said: object, supported: object) -> bool:
    """Whether two values agree: lists may be tuples, one flag stands for a list of flags, and decoders' lists are
    compared from the end, so they may have more entries before."""
    if not isinstance(supported, tuple):
        return said == supported and isinstance(said, bool) == isinstance(supported, bool)
    if isinstance(said, bool):
        return all(value is said for value in supported)
    if not isinstance(said, Sequence) or isinstance(said, str):
        return False
    is_reversed = key.startswith(("decoder_", "upsample_"))
    return tuple(said)[-len(supported) if is_reversed and supported else 0 :] == supported


def _shown(value: object) -> str:
    text = json.dumps(value) if isinstance(value, bool | list | tuple | None) else str(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."


def check_widths(config: Mapping[str, Any], specs: Mapping[Role, CoderSpec], location: str) -> None:
    """Check the widths in the weights against the configuration of the folder they are in.

    Raises:
        ArtifactError: they differ; names the first layer.
    """
    for role, spec in specs.items():
        family = get_family(spec.family)
        said = _base_width(config, family, role, location)
        if said is None:
            continue
        key, base_width = said
        build = family.decoder_spec if role == "decoder" else family.encoder_spec
        promised = _widths(build(base_width, _latent_width(specs)))
        if role == "encoder" and family.config_keys.entry_is_latent:
            promised = _with_entry(promised, _latent_width(specs))
        for address, block in spec.blocks():
            found = block.in_width, block.out_width
            expected = promised.get(address, found)  # the release may lack a 1x1 layer beside the latent
            if expected != found:
                raise ArtifactError(
                    f"{location}: {CONFIG_NAME} says {key} {_shown(config[key])}, so "
                    f"{_arrow(expected)} channels in {role} {address}; the weights have {_arrow(found)}. "
                    "If the weights are right (a pruned decoder), give the weights file itself instead of the folder."
                )


def _widths(spec: CoderSpec) -> dict[str, tuple[int, int]]:
    return {address: (block.in_width, block.out_width) for address, block in spec.blocks()}


def _with_entry(widths: Mapping[str, tuple[int, int]], entry_width: int) -> dict[str, tuple[int, int]]:
    """The widths with another one after the first block, up to the block that changes it."""
    changed = dict(widths)
    first, *others = widths
    kept = widths[first][1]
    changed[first] = widths[first][0], entry_width
    for address in others:
        out_width = widths[address][1]
        changed[address] = entry_width, entry_width if out_width == kept else out_width
        if out_width != kept:
            break
    return changed


def _base_width(config: Mapping[str, Any], family: Family, role: Role, location: str) -> tuple[str, int] | None:
    """The key for the base width of a role, and the base width; None if the configuration has none."""
    for key, multiples in family.config_keys.widths.get(role, ()):
        said = config.get(key)
        if said is None:
            continue
        widths = said if multiples is not None else [said]
        if not isinstance(widths, list | tuple) or not widths or not all(map(_is_width, widths)):
            expected = "a width" if multiples is None else f"{len(multiples)} widths"
            raise ArtifactError(f"{location}: {key} of {CONFIG_NAME} is {said!r:.80}; expected {expected}.")
        if multiples is None:
            return key, said
        base_width = said[0] // multiples[0]
        if tuple(said) != tuple(base_width * multiple for multiple in multiples):
            listed = " : ".join(map(str, multiples))
            raise ArtifactError(
                f"{location}: {key} is {_shown(said)}; supported for {family.name}: widths as {listed}."
            )
        return key, base_width
    return None


def _is_width(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_WIDTH


def _arrow(widths: tuple[int, int]) -> str:
    return f"{widths[0]} -> {widths[1]}"
