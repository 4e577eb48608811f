"""The families that this version knows, by name, and the layouts of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.spec.light import has_same_blocks
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families import (
    flux2,
    hunyuanvideo,
    hunyuanvideo15,
    leanvae,
    ltx,
    qwen_image,
    qwen_image2,
    seedvr2,
    stable_diffusion,
    stable_video_diffusion,
    wan21,
    wan22,
)
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Layout

_ANY_WIDTH = 8  # the kinds of blocks are the same at every width

SpecT = TypeVar("SpecT", DecoderSpec, EncoderSpec)

_FOLDERS = (
    wan21,
    wan22,
    qwen_image,
    qwen_image2,
    ltx,
    stable_diffusion,
    flux2,
    leanvae,
    hunyuanvideo,
    hunyuanvideo15,
    stable_video_diffusion,
    seedvr2,
)
"""Where two layouts have the same keys, the first is taken unless the user or a configuration names the other's
family."""

FAMILIES: dict[str, Family] = {family.name: family for folder in _FOLDERS for family in folder.FAMILIES}
LAYOUTS: dict[str, Layout] = {layout.name: layout for folder in _FOLDERS for layout in folder.LAYOUTS}
GROUPS: dict[str, tuple[str, ...]] = ltx.GROUPS
"""Names for all versions of a family together, where a checkpoint's tensors show which version it is."""


def get_family(name: str) -> Family:
    """The family of that name. Raises SpecError that lists the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        groups = " or ".join(GROUPS)
        raise SpecError(
            f"unknown family '{name}'; this version knows {', '.join(FAMILIES)}, and for a checkpoint {groups} (its "
            "tensors show the version)"
        ) from None


def original_layout(family: str) -> Layout:
    """The layout of a family's own files."""
    return next(layout for layout in LAYOUTS.values() if layout.family == family and layout.config_class is None)


def class_layout(family: str) -> Layout | None:
    """The layout of a family's class in diffusers; None if it has none."""
    return next((layout for layout in LAYOUTS.values() if layout.family == family and layout.config_class), None)


def families_named(name: str) -> tuple[str, ...]:
    """What `--family` may name: one family, or the versions of a group. Raises SpecError that lists the known ones."""
    return GROUPS[name] if name in GROUPS else (get_family(name).name,)


def are_one_network(first: Family, second: Family) -> bool:
    """Whether two families differ in name only: the same specs, latent statistics and defaults."""
    return _without_name(first) == _without_name(second)


@cache
def _specs(name: str) -> tuple[DecoderSpec | EncoderSpec, ...]:
    """The originals at some small width, under one name."""
    family = FAMILIES[name]
    builds = (family.decoder_spec, family.encoder_spec)
    return tuple(build(_ANY_WIDTH, family.latent_width).model_copy(update={"family": ""}) for build in builds)


def _without_name(family: Family) -> tuple[object, ...]:
    defaults = family.shallow_stages, family.paper_keep_ratio, dict(family.paper_operators)
    return *_specs(family.name), family.latent_mean, family.latent_std, *defaults


def original_like(spec: DecoderSpec) -> Callable[[int, int], DecoderSpec]:
    """The builder of a family's original, base width and latent width to spec, with what a configuration would say of
    `spec`, such as its causality."""
    return _builder(spec, get_family(spec.family).decoder_spec, DecoderSpec)


def has_family_blocks(spec: DecoderSpec) -> bool:
    """Whether a decoder has the blocks of its family's original, at any widths; light decoders have not."""
    try:
        original = original_like(spec)(_ANY_WIDTH, get_family(spec.family).latent_width)
    except SpecError:  # its description fits no original of the family
        return False
    return has_same_blocks(spec, original)


def shallow_stages(spec: DecoderSpec) -> tuple[str, ...]:
    """The stages that `--ratio` prunes: the family's shallow ones that the decoder has; if it has none, all that can be
    pruned."""
    names = {stage.name for stage in spec.stages}
    found = tuple(name for name in get_family(spec.family).shallow_stages if name in names)
    return found or tuple(dict.fromkeys(group.stage for group in channel_groups(spec)))


def encoder_like(spec: CoderSpec) -> Callable[[int, int], EncoderSpec]:
    """`original_like` for the family's encoder; `spec` may be of either role."""
    return _builder(spec, get_family(spec.family).encoder_spec, EncoderSpec)


def _builder(spec: CoderSpec, released: Callable[[int, int], SpecT], role: type[SpecT]) -> Callable[[int, int], SpecT]:
    family = get_family(spec.family)
    config = family.described(spec)

    def build(base_width: int, latent_width: int) -> SpecT:
        configured = family.configured(released(base_width, latent_width), config)
        assert isinstance(configured, role)
        return configured

    return build
