"""LeanVAE: a light VAE on the grid of Wan, 4 x 8 x 8 pixels per latent, with latents of its own.

Pixels become Haar bands. Low and high bands have branches of their own (base width, and three times that), which are
joined and mapped to the latents by a linear map that the decoder inverts step by step. Released with 4 and with 16
channels, at base width 128. Latents are raw: mean 0 and deviation 1 mean no scale. (The diffusion models trained on
them multiply them by 0.7744 with 4 channels and by 1 with 16; that is not part of the VAE.)

Reference: LeanVAE, arXiv 2503.14325. The Flash-VAED paper has no layout for it: all stages are pruned, inside blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flashvaed_cli.decoders.spec.blocks import ConvBlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.naf_blocks import (
    PATCH,
    IstaSpec,
    NafSpec,
    cell_head_spec,
    cell_stem_spec,
    naf_spec,
)
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.family import ConfigKeys, Contradiction, Family, OtherPrograms
from flashvaed_cli.limits import MAX_STAGE_BLOCKS

NAME = "leanvae"
LATENT_WIDTH = 4
RELEASED_BASE_WIDTH = 128
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8
HIGH_SHARE = 3
"""Width of the high branch in base widths; that of the low branch is 1."""


class Depths(NamedTuple):
    """Numbers of layers, under the names of the release's arguments."""

    sep_num_layer: int = 2
    fusion_num_layer: int = 4
    ista_iter_num: int = 2
    ista_layer_num: int = 2


def leanvae_decoder_spec(
    base_width: int, latent_width: int = LATENT_WIDTH, depths: Depths | None = None
) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    depths = depths or Depths()
    low, high = base_width, HIGH_SHARE * base_width
    width = low + high
    steps = ((naf_spec(width, residual=False),) * depths.ista_layer_num,) * depths.ista_iter_num
    bottleneck = IstaSpec(
        start=point_conv(latent_width, width),
        measure=point_conv(width, latent_width),
        analysis=steps,
        synthesis=steps,
    )
    head = cell_head_spec(low, high)
    stages = (
        StageSpec(name="bottleneck", blocks=(bottleneck,)),
        StageSpec(name="fusion", blocks=(naf_spec(width),) * depths.fusion_num_layer),
        StageSpec(name="branches", blocks=(naf_spec(low, high),) * depths.sep_num_layer),
        StageSpec(name="head", blocks=(head,)),
    )
    return DecoderSpec(family=NAME, stages=stages, temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR)


def leanvae_encoder_spec(
    base_width: int, latent_width: int = LATENT_WIDTH, depths: Depths | None = None
) -> EncoderSpec:
    """The original encoder at a base width (128: the release)."""
    depths = depths or Depths()
    low, high = base_width, HIGH_SHARE * base_width
    stem = cell_stem_spec(low, high)
    stages = (
        StageSpec(name="stem", blocks=(stem,)),
        StageSpec(name="branches", blocks=(naf_spec(low, high),) * depths.sep_num_layer),
        StageSpec(name="fusion", blocks=(naf_spec(low + high),) * depths.fusion_num_layer),
        StageSpec(name="quant", blocks=(ConvBlockSpec(conv=point_conv(low + high, 2 * latent_width)),)),
    )
    return EncoderSpec(family=NAME, stages=stages, temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR)


def described(spec: CoderSpec) -> dict[str, Any]:
    """The depths of a spec, under the names of the release's arguments; none for a decoder with other blocks."""
    if {"fusion", "branches"} - {stage.name for stage in spec.stages}:
        return {}
    found: dict[str, Any] = {
        "sep_num_layer": len(spec.stage("branches").blocks),
        "fusion_num_layer": len(spec.stage("fusion").blocks),
    }
    first = spec.stages[0].blocks[0]
    if isinstance(first, IstaSpec):
        found |= {"ista_iter_num": len(first.analysis), "ista_layer_num": len(first.analysis[0])}
    return found


def configured(spec: DecoderSpec | EncoderSpec, config: Mapping[str, Any]) -> DecoderSpec | EncoderSpec:
    """The spec with the depths given by a configuration or by the names of the tensors.

    Raises:
        SpecError: a depth that is not a number of layers.
    """
    said = {name: config[name] for name in Depths._fields if config.get(name) is not None}
    for name, depth in said.items():
        if not isinstance(depth, int) or isinstance(depth, bool) or not 0 < depth <= MAX_STAGE_BLOCKS:
            raise SpecError(f"{name} is {depth!r:.40}, which is not a number of layers")
    build = leanvae_decoder_spec if isinstance(spec, DecoderSpec) else leanvae_encoder_spec
    base_width = spec.stage("fusion").blocks[0].in_width // (1 + HIGH_SHARE)
    return build(base_width, spec.latent_width, Depths(**said))


def contradictions(spec: CoderSpec, config: Mapping[str, Any]) -> Iterable[Contradiction]:
    """Widths and depths of a configuration that the tensors contradict."""
    branches, fusion = spec.stage("branches").blocks[0], spec.stage("fusion").blocks[0]
    assert isinstance(branches, NafSpec)
    found = {**described(spec), "embedding_dim": fusion.in_width}
    found |= dict(zip(("l_dim", "h_dim"), (branch.width for branch in branches.branches), strict=True))
    for key, value in found.items():
        if config.get(key) not in (None, value):
            yield Contradiction(key, config[key], value)


LEANVAE = Family(
    name=NAME,
    decoder_spec=leanvae_decoder_spec,
    encoder_spec=leanvae_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=(0.0,) * LATENT_WIDTH,
    latent_std=(1.0,) * LATENT_WIDTH,
    latents_are_raw=True,
    released_base_width=RELEASED_BASE_WIDTH,
    shallow_stages=("bottleneck", "fusion", "branches"),
    paper_keep_ratio=0.5,
    paper_operators={},
    config_keys=ConfigKeys(
        fixed={"patch_size": (PATCH,)},
        widths={"decoder": (("l_dim", None),), "encoder": (("l_dim", None),)},
        read=frozenset((*Depths._fields, "embedding_dim", "l_dim", "h_dim")),
        latent_key="latent_dim",
        contradictions=contradictions,
        in_arguments=True,
    ),
    configured=configured,
    described=described,
    native_obstacle="diffusers has no class for LeanVAE",
    elsewhere=OtherPrograms(repository="Yumic/LeanVAE", licence="mit"),
)
