"""What diffusers' classes are built with; that they take it is tested with diffusers itself (tests/parity)."""

from __future__ import annotations

import json

import pytest
from small_decoders import flash_spec

from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.diffusers_config import (
    ARGUMENTS,
    diffusers_config,
    encoder_fault,
    single_file_note,
)
from flashvaed_cli.families.ltx.config import with_space_padding
from flashvaed_cli.families.registry import FAMILIES, class_layout, get_family, original_like
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.toy import kept_of

CLASSES = {
    "wan2.1": "AutoencoderKLWan",
    "wan2.2": "AutoencoderKLWan",
    "qwen-image": "AutoencoderKLQwenImage",
    "qwen-image-2": "AutoencoderKLQwenImage21",
    "ltx-video-0.9.0": "AutoencoderKLLTXVideo",
    "ltx-video-0.9.1": "AutoencoderKLLTXVideo",
    "ltx-video-0.9.5": "AutoencoderKLLTXVideo",
    "ltx-2": "AutoencoderKLLTX2Video",
    "ltx-2.3": "AutoencoderKLLTX2Video",
    "hunyuanvideo": "AutoencoderKLHunyuanVideo",
    "hunyuanvideo-1.5": "AutoencoderKLHunyuanVideo15",
    "stable-video-diffusion": "AutoencoderKLTemporalDecoder",
    **dict.fromkeys(("stable-diffusion", "sdxl", "sd3", "flux.1"), "AutoencoderKL"),
    "flux.2": "AutoencoderKLFlux2",
}
# What the class itself has as None: latent statistics are factors there where all channels have the same.
ABSENT = {"AutoencoderKL": {"shift_factor", "latents_mean", "latents_std"}}
STATISTICS = ((0.0,) * 8, (1.0,) * 8)


def test_every_family_with_a_class_is_tested() -> None:
    assert {name for name in FAMILIES if class_layout(name)} == set(CLASSES)


@pytest.mark.parametrize("family", CLASSES)
def test_every_argument_has_a_value_that_json_holds(family: str) -> None:
    name, decoder = CLASSES[family], get_family(family).decoder_spec(16, 8)
    config = diffusers_config(name, decoder, None, STATISTICS)
    assert set(config) == {"_class_name", *ARGUMENTS[name]} and config["_class_name"] == name
    json.dumps(config, allow_nan=False)
    absent = {key for key, value in config.items() if value is None}
    assert absent <= ABSENT.get(name, {"patch_size"})


def test_the_class_is_built_for_the_encoder_that_is_there() -> None:
    """A decoder that is pruned everywhere has few groups in most norms; the encoder beside it has them all."""
    family = get_family("flux.1")
    spec, encoder = family.decoder_spec(32, 16), family.encoder_spec(32, 16)
    statistics = (family.latent_mean, family.latent_std)
    narrow = narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3")))
    assert family.described(narrow)["norm_num_groups"] == 24
    base = original_like(narrow)(32, 16)
    config = diffusers_config("AutoencoderKL", base, encoder, statistics)
    assert (config["norm_num_groups"], config["use_quant_conv"], config["use_post_quant_conv"]) == (32, False, False)
    assert (config["scaling_factor"], config["shift_factor"]) == (0.3611, 0.1159)
    alone = diffusers_config("AutoencoderKL", family.decoder_spec(4, 16), None, statistics)
    assert (alone["norm_num_groups"], alone["block_out_channels"]) == (4, [4, 8, 16, 16])
    by_channel = diffusers_config("AutoencoderKL", spec, encoder, ((0.0, 0.1) * 8, (1.0,) * 16))
    assert by_channel["scaling_factor"] == 1.0 and by_channel["latents_mean"] == [0.0, 0.1] * 8


def test_decoder_and_encoder_may_have_widths_of_their_own() -> None:
    family = get_family("wan2.1")
    config = diffusers_config("AutoencoderKLWan", family.decoder_spec(12, 8), family.encoder_spec(96, 8), STATISTICS)
    assert (config["base_dim"], config["decoder_base_dim"], config["z_dim"]) == (96, 12, 8)
    family = get_family("ltx-video-0.9.0")
    config = diffusers_config(
        "AutoencoderKLLTXVideo", family.decoder_spec(16, 8), family.encoder_spec(8, 8), STATISTICS
    )
    assert config["block_out_channels"] == [8, 16, 32, 32]
    assert config["decoder_block_out_channels"] == [16, 32, 64, 64]


def test_decoders_that_no_class_has() -> None:
    with pytest.raises(ExportError, match=r"AutoencoderKLWan has no decoder like this one \(.*mid"):
        diffusers_config("AutoencoderKLWan", flash_spec(), None, STATISTICS)
    mirrored = with_space_padding(get_family("ltx-video-0.9.0").decoder_spec(8, 8), "reflect")
    with pytest.raises(ExportError, match="no decoder that mirrors frames"):
        diffusers_config("AutoencoderKLLTXVideo", mirrored, None, STATISTICS)
    with pytest.raises(ExportError, match="this decoder has none"):
        diffusers_config("AutoencoderKLLTXVideo", get_family("ltx-video-0.9.0").decoder_spec(8, 8), None, ((), ()))


@pytest.mark.parametrize(
    ("family", "decoder_width", "encoder_width", "latent_width", "fault"),
    [
        ("wan2.1", 12, 96, 8, None),
        ("wan2.1", 12, 12, 4, "a different network"),
        ("qwen-image", 12, 12, 8, None),
        ("qwen-image", 12, 96, 8, "one base_dim, the encoder needs 96 and the decoder 12"),
        ("qwen-image-2", 12, 96, 8, None),
        ("ltx-2", 16, 8, 8, None),
        ("ltx-2", 16, 16, 8, "begins its encoder with 8 channels, this one has 16"),
    ],
)
def test_encoders_beside_a_decoder(
    family: str, decoder_width: int, encoder_width: int, latent_width: int, fault: str | None
) -> None:
    decoder = get_family(family).decoder_spec(decoder_width, 8)
    found = encoder_fault(CLASSES[family], decoder, get_family(family).encoder_spec(encoder_width, latent_width))
    assert found is None if fault is None else fault in str(found)


def test_who_reads_a_single_file() -> None:
    """Each of these is tried out in tests/parity."""

    def note(family: str, encoder_width: int | None, decoder: DecoderSpec | None = None) -> str:
        built = get_family(family)
        encoder = None if encoder_width is None else built.encoder_spec(encoder_width, 8)
        return single_file_note(CLASSES[family], decoder or built.decoder_spec(16, 8), encoder)

    assert "does not read it: AutoencoderKLLTX2Video begins its encoder with 8" in note("ltx-2", 16)
    for family in ("wan2.1", "ltx-video-0.9.0", "ltx-video-0.9.1", "ltx-2"):
        assert f"{CLASSES[family]}.from_single_file loads it" in note(family, 8)
        assert "wants an encoder in the file" in note(family, None)
    assert "base width 128, this has 8" in note("ltx-video-0.9.5", 8)
    assert "from_single_file loads it" in note("ltx-video-0.9.5", 128)
    for family in ("wan2.2", "qwen-image", "qwen-image-2"):
        assert f"reads no single file of {family}" in note(family, 8)
    assert "other programs need this program's decoder" in note("wan2.1", 8, flash_spec())
