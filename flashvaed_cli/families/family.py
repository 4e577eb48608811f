"""The record that describes a family of VAEs; each folder of this room fills one in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.layers import TimePadding
from flashvaed_cli.decoders.spec.operators import Operator


def _as_it_is(spec: DecoderSpec | EncoderSpec, _config: Mapping[str, Any]) -> DecoderSpec | EncoderSpec:
    return spec


def _no_description(_spec: CoderSpec) -> dict[str, Any]:
    return {}


def _no_contradictions(_spec: CoderSpec, _config: Mapping[str, Any]) -> Iterable[Contradiction]:
    return ()


def _no_assumptions(_spec: CoderSpec, _config: Mapping[str, Any]) -> str | None:
    return None


def _no_separable_padding(_config: Mapping[str, Any]) -> TimePadding | None:
    return None


class Contradiction(NamedTuple):
    """A key of a configuration, its value there, and what the tensors show instead."""

    key: str
    said: object
    found: object


@dataclass(frozen=True)
class ConfigKeys:
    """The keys and values that a configuration of the family's checkpoints may have.

    Attributes:
        fixed: by key, the values that the family's network has; any other is refused.
        read: keys that `configured` or `contradictions` read.
        idle: keys that change nothing in this program, or nothing that shapes do not show.
        latent_key: the key for the number of latent channels.
        widths: per role, the keys for the base width, of which the first present counts. Its value is the base width
            or, with multiples, a list of those multiples of it.
        contradictions: values of a configuration that a coder's tensors contradict.
        assumed: a warning about what is assumed of a coder because neither shapes nor configuration show it; None: no
            warning.
        separable_padding: how depthwise-separable layers pad in time if a configuration says that they differ from
            dense ones; None: as dense ones. Raises SpecError for a value that is not supported.
        entry_is_latent: the encoder's first width is the number of latent channels, whatever the base width.
        in_metadata: the family's own files have a configuration in their metadata.
        has_factors: `scaling_factor` and `shift_factor` of a configuration are the statistics of all channels and
            replace the release's.
        in_arguments: the trainer's arguments, stored with the weights, are the configuration.
    """

    fixed: Mapping[str, tuple[Any, ...]]
    read: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    latent_key: str = "z_dim"
    widths: Mapping[str, tuple[tuple[str, tuple[int, ...] | None], ...]] = field(default_factory=dict)
    contradictions: Callable[[CoderSpec, Mapping[str, Any]], Iterable[Contradiction]] = _no_contradictions
    assumed: Callable[[CoderSpec, Mapping[str, Any]], str | None] = _no_assumptions
    separable_padding: Callable[[Mapping[str, Any]], TimePadding | None] = _no_separable_padding
    entry_is_latent: bool = False
    in_metadata: bool = False
    has_factors: bool = False
    in_arguments: bool = False

    @property
    def known(self) -> frozenset[str]:
        """All keys that are known, with or without effect."""
        widths = {key for keys in self.widths.values() for key, _ in keys}
        return frozenset(self.fixed) | self.read | self.idle | widths | {self.latent_key}


@dataclass(frozen=True)
class ComfyUIReader:
    """How ComfyUI's own loader reads the files of a family.

    Attributes:
        any_width: the base width is read from the file; else it must be the release's.
        config: the configuration that the loader needs in the metadata; None: none.
        has_node: our node can replace its class; not possible if latents have no time axis there.
    """

    any_width: bool = False
    has_node: bool = True
    config: Callable[[DecoderSpec], dict[str, Any]] | None = None


@dataclass(frozen=True)
class OtherPrograms:
    """How other programs support a family.

    Attributes:
        repository: of the released model on the Hub; None: there is none yet.
        licence: the licence field there.
        diffusers_arguments: arguments of diffusers' class other than widths, for comparing it with ours; None: not
            compared.
        reads_single_file: `from_single_file` of the class knows the original's names.
        tells_by_released_encoder: it detects the version by the encoder's width, so only the release's encoder works.
        comfyui: None: ComfyUI has no class for the family.
        taehv: names of TAEHV's files for its latents, without suffix.
    """

    repository: str | None = None
    licence: str | None = None
    diffusers_arguments: Mapping[str, Any] | None = None
    reads_single_file: bool = False
    tells_by_released_encoder: bool = False
    comfyui: ComfyUIReader | None = None
    taehv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family: the specs of its original, the paper's layout for it, and its support in other programs.

    Attributes:
        decoder_spec, encoder_spec: from the base width and the latent width.
        shallow_stages: the stages that the paper prunes.
        paper_keep_ratio: the fraction of channels that it keeps there.
        paper_operators: the operator of each stage's residual blocks after conversion.
        configured: puts into a spec what a checkpoint's configuration says and its shapes do not show.
        described: the configuration for which `configured` gives a spec back.
        native_obstacle: why no stock class builds this program's narrower decoders; None: one does.
        latents_are_raw: latents of any number of channels have mean 0 and deviation 1.
        frames_per_second: the rate that the family's models are trained at.
    """

    name: str
    decoder_spec: Callable[[int, int], DecoderSpec]
    encoder_spec: Callable[[int, int], EncoderSpec]
    latent_width: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    released_base_width: int
    shallow_stages: tuple[str, ...]
    paper_keep_ratio: float
    paper_operators: Mapping[str, Operator]
    config_keys: ConfigKeys
    configured: Callable[[DecoderSpec | EncoderSpec, Mapping[str, Any]], DecoderSpec | EncoderSpec] = _as_it_is
    described: Callable[[CoderSpec], dict[str, Any]] = _no_description
    native_obstacle: str | None = None
    latents_are_raw: bool = False
    frames_per_second: int = 16
    elsewhere: OtherPrograms = field(default_factory=OtherPrograms)
