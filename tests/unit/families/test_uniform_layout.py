from __future__ import annotations

import pytest

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, HeadSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.families.registry import FAMILIES, get_family
from flashvaed_cli.families.uniform_layout import encoder_base_width, fits_uniform_layout
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.unit.export.small_decoders import layer, short_spec


@pytest.mark.parametrize(("base_width", "latent_width"), [(4, 16), (12, 16), (96, 16), (7, 8)])
def test_original_at_any_base_width_fits(base_width: int, latent_width: int) -> None:
    fit = fits_uniform_layout(wan_decoder_spec(base_width, latent_width), wan_decoder_spec)
    assert (fit.base_width, fit.deviation) == (base_width, None)


@pytest.mark.parametrize(
    ("address", "block", "deviation"),
    [
        (
            "up0.1",
            ResBlockSpec(conv1=layer("dwsep3d", 16, 16), conv2=layer("causal3d", 16, 16)),
            "up0.1.conv1 is dwsep3d 16 to 16 with kernel 3x3x3, not causal3d 16 to 16 with kernel 3x3x3",
        ),
        (
            "up3.2",
            ResBlockSpec(conv1=layer("causal3d", 4, 3), conv2=layer("causal3d", 3, 4)),
            "up3.2.conv1 is causal3d 4 to 3",
        ),
        (
            "up3.1",
            ResBlockSpec(
                conv1=layer("causal3d", 4, 4), conv2=layer("causal3d", 4, 4), shortcut=layer("pointwise", 4, 4)
            ),
            "up3.1.shortcut is pointwise 4 to 4 with kernel 1x1x1, not absent",
        ),
        ("mid.1", AttentionSpec(width=16, inner_width=6), "mid.1 has width 16 and 6 inside, not 16 and 16"),
    ],
)
def test_first_deviation_is_named(address: str, block: BlockSpec, deviation: str) -> None:
    fit = fits_uniform_layout(wan_decoder_spec(4).with_blocks({address: block}), wan_decoder_spec)
    assert fit.base_width is None
    assert fit.deviation is not None
    assert fit.deviation.startswith(f"against the original at the head's base width, 4: {deviation}")


def test_missing_and_superfluous_blocks_are_named() -> None:
    fit = fits_uniform_layout(short_spec(), wan_decoder_spec)
    assert "mid.0 is of kind attention, not resblock" in str(fit.deviation)
    spec = wan_decoder_spec(4)
    stages = tuple(
        StageSpec(name=stage.name, blocks=(*stage.blocks[:3], stage.blocks[2], *stage.blocks[3:]))
        if stage.name == "up3"
        else stage
        for stage in spec.stages
    )
    fit = fits_uniform_layout(DecoderSpec(**{**dict(spec), "stages": stages}), wan_decoder_spec)
    assert "up3.3 is one block too many" in str(fit.deviation)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "leanvae"])  # no class builds that one
def test_the_base_width_of_an_encoder(family: str) -> None:
    spec = get_family(family).encoder_spec(8, 8)
    assert encoder_base_width(spec) == 8
    blocks = dict(spec.blocks())
    head = blocks["head.0"]
    assert isinstance(head, HeadSpec)
    other: dict[str, BlockSpec] = {
        "head.0": HeadSpec(conv=head.conv.model_copy(update={"kernel": (head.conv.kernel[0], 1, 3)}), norm=head.norm)
    }
    changed = spec.with_blocks(other)
    assert isinstance(changed, EncoderSpec) and encoder_base_width(changed) is None
