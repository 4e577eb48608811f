"""The families that this version knows, by name."""

from __future__ import annotations

from collections.abc import Callable

from flashvaed_cli.decoders.family import Family
from flashvaed_cli.decoders.ltx import LTX_090, LTX_091, LTX_095, LTX_2
from flashvaed_cli.decoders.qwen_image import QWEN_IMAGE
from flashvaed_cli.decoders.qwen_image2 import QWEN_IMAGE_2
from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.decoders.wan import WAN21
from flashvaed_cli.decoders.wan22 import WAN22
from flashvaed_cli.errors import SpecError

FAMILIES: dict[str, Family] = {
    family.name: family for family in (WAN21, WAN22, QWEN_IMAGE, QWEN_IMAGE_2, LTX_090, LTX_091, LTX_095, LTX_2)
}


def get_family(name: str) -> Family:
    """The family of that name. Raises SpecError that lists the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise SpecError(f"unknown family '{name}'; this version knows {', '.join(FAMILIES)}") from None


def original_like(spec: DecoderSpec) -> Callable[[int, int], DecoderSpec]:
    """The builder of a family's original, base width and latent width to spec, with what a configuration says of
    `spec`: causality and the like."""
    family = get_family(spec.family)
    config = family.described(spec)

    def build(base_width: int, latent_width: int) -> DecoderSpec:
        configured = family.configured(family.decoder_spec(base_width, latent_width), config)
        assert isinstance(configured, DecoderSpec)
        return configured

    return build
