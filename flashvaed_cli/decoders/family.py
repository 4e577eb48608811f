"""What distinguishes one family of video VAEs from another, beyond its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashvaed_cli.decoders.layer_spec import Operator
from flashvaed_cli.decoders.spec import DecoderSpec, EncoderSpec


def _as_it_is(spec: DecoderSpec | EncoderSpec, _config: Mapping[str, Any]) -> DecoderSpec | EncoderSpec:
    return spec


def _nothing(_spec: DecoderSpec) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One family: how its original is specified, and the paper's layout for it.

    `decoder_spec` and `encoder_spec` take the base width and the latent width. `shallow_stages` are those
    that the paper prunes, `paper_keep_ratio` the fraction of channels that it keeps there, and
    `paper_operators` the operator of each stage's residual blocks after conversion. `configured` puts what a
    checkpoint's configuration says, and its shapes do not, into a spec; `described` gives it back. `uniform_note`
    says where a decoder that is the original at another base width loads (None: as Wan's do).
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
    configured: Callable[[DecoderSpec | EncoderSpec, Mapping[str, Any]], DecoderSpec | EncoderSpec] = _as_it_is
    described: Callable[[DecoderSpec], dict[str, Any]] = _nothing
    uniform_note: str | None = None
