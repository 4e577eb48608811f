"""What distinguishes one family of VAEs from another: the record that each folder of this room fills in."""

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
    """A key of a configuration, what it says, and what the tensors say."""

    key: str
    said: object
    found: object


@dataclass(frozen=True)
class ConfigKeys:
    """What the configuration of a family's checkpoints may say.

    Attributes:
        fixed: the values that the network of this family has, by key; any other is refused.
        read: keys that `configured` or `contradictions` look at.
        idle: keys that change nothing that this program does, or nothing that shapes do not tell.
        latent_key: what the number of latent channels is called.
        widths: per role, the keys that tell the base width, the first that is given counts: its value, or, with
            multiples, a list of those multiples of it.
        contradictions: what a configuration says and the tensors of a coder deny.
        assumed: a warning of what is taken of a coder where neither shapes nor the configuration say it.
        separable_padding: how depthwise-separable layers pad in time, where a configuration says that it is not as the
            dense ones do; raises SpecError at a value that is not supported.
        entry_is_latent: the encoder's first width is the number of latent channels, whatever the base width.
        in_metadata: the family's own files carry a configuration in their metadata.
        has_factors: `scaling_factor` and `shift_factor` of a configuration are the statistics of all channels, in
            place of the release's.
        in_arguments: the arguments of the trainer stand beside the weights, and are one.
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
        """All keys that play a role here, or none that matters."""
        widths = {key for keys in self.widths.values() for key, _ in keys}
        return frozenset(self.fixed) | self.read | self.idle | widths | {self.latent_key}


@dataclass(frozen=True)
class ComfyUIReader:
    """How ComfyUI's own loader reads the files of a family.

    Attributes:
        any_width: the base width is read from the file; else it is that of the release.
        config: the configuration that its loader needs in the metadata; None: none.
        has_node: our node can stand for its class; not where latents have no axis of time there.
    """

    any_width: bool = False
    has_node: bool = True
    config: Callable[[DecoderSpec], dict[str, Any]] | None = None


@dataclass(frozen=True)
class OtherPrograms:
    """What other programs know of a family.

    Attributes:
        repository: of the released model on the Hub; None: there is none yet.
        licence: the licence field there.
        diffusers_arguments: what diffusers' class takes beside the widths, to run it beside ours; None: not compared.
        reads_single_file: `from_single_file` of the class knows the original's names.
        tells_by_released_encoder: and tells the version by the width of the encoder, so the release's alone will do.
        comfyui: None: ComfyUI has no class for the family.
        taehv: what the files of TAEHV for its latents are called, without their suffix.
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
    """One family: how its original is specified, the paper's layout for it, and what other programs know of it.

    `decoder_spec` and `encoder_spec` take the base width and the latent width. `shallow_stages` are those
    that the paper prunes, `paper_keep_ratio` the fraction of channels that it keeps there, and
    `paper_operators` the operator of each stage's residual blocks after conversion. `configured` puts what a
    checkpoint's configuration says, and its shapes do not, into a spec; `described` gives it back. `config_keys` are
    what a configuration may say. `native_obstacle` says why no stock class builds a narrower decoder that this
    program makes; None where one does. `latents_are_raw`: of any number of channels, whose mean is 0 and deviation 1.
    `frames_per_second` is the rate that the family's models are trained at.
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
