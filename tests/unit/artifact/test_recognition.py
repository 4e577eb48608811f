from __future__ import annotations

from dataclasses import replace

import pytest
from artifact_specs import DECODER_SPEC, released_shapes, specs_of

from flashvaed_cli.artifact.foreign.layouts import slots
from flashvaed_cli.artifact.foreign.recognition import common_prefix, present_roles, recognise, twins
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import FAMILIES, LAYOUTS, are_one_network, get_family

WAN_LAYOUTS = [layout for layout in LAYOUTS.values() if layout.family in ("wan2.1", "wan2.2", "qwen-image")]


@pytest.mark.parametrize("layout", WAN_LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_recognised(layout: Layout) -> None:
    for spec in specs_of(layout.family).values():
        shapes = {slot.foreign: slot.shape for slot in slots(spec, layout)}
        found = recognise(shapes)
        assert found.places == layout.places
        assert found is layout or (layout.family, found.family) == ("qwen-image", "wan2.1")
        assert recognise(shapes, family=layout.family) is layout
        assert present_roles(shapes, layout) == (spec.role,)
        del shapes[next(iter(shapes))]
        assert recognise(shapes, family=layout.family) is layout


def test_equal_keys_are_distinguished_by_the_configuration_only() -> None:
    shapes = {slot.foreign: slot.shape for slot in slots(DECODER_SPEC, LAYOUTS["diffusers"])}
    assert recognise(shapes).family == "wan2.1"
    assert twins(LAYOUTS["diffusers"]) == ("qwen-image",) and twins(LAYOUTS["wan2.2-diffusers"]) == ()
    assert recognise(shapes, config_class="AutoencoderKLQwenImage").name == "qwen-diffusers"
    assert recognise(shapes, config_class="AutoencoderKLWan").name == "diffusers"
    with pytest.raises(ArtifactError, match=r"is of AutoencoderTiny; this version reads .*AutoencoderKLQwenImage"):
        recognise(shapes, config_class="AutoencoderTiny")


@pytest.mark.parametrize("family", [None, "ltx-2"])
def test_the_class_of_a_configuration_wins_over_a_guess(family: str | None) -> None:
    names = {"decoder.mid.block_1.conv1.conv.weight": (8, 8, 3, 3, 3), "decoder.mid.block_1.x": (8,)}
    with pytest.raises(ArtifactError, match="is of AutoencoderKLSound; this version reads"):
        recognise(names, config_class="AutoencoderKLSound", family=family)


def test_only_families_that_compute_the_same_are_taken_for_each_other() -> None:
    alike = {(a, b) for a in FAMILIES for b in FAMILIES if a < b and are_one_network(get_family(a), get_family(b))}
    assert alike == {("qwen-image", "wan2.1")}
    assert {twins(layout) for layout in WAN_LAYOUTS} == {("qwen-image",), ("wan2.1",), ()}


def test_names_of_networks_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Qwen-Image's latents had another scale, a bare file would need --family."""
    shapes = {slot.foreign: slot.shape for slot in slots(DECODER_SPEC, LAYOUTS["diffusers"])}
    other = replace(FAMILIES["qwen-image"], latent_std=(1.0,) * 16)
    monkeypatch.setitem(FAMILIES, "qwen-image", other)
    with pytest.raises(
        ArtifactError, match=r"fit diffusers, qwen-diffusers equally well.*wan2\.1 or --family qwen-image"
    ):
        recognise(shapes)
    assert recognise(shapes, family="qwen-image").name == "qwen-diffusers"
    assert twins(LAYOUTS["diffusers"]) == ()


def test_a_family_that_the_names_contradict_is_refused() -> None:
    shapes = {slot.foreign: slot.shape for slot in slots(DECODER_SPEC, LAYOUTS["wan-original"])}
    with pytest.raises(ArtifactError) as caught:
        recognise(shapes, "x", family="wan2.2")
    told, *candidates = str(caught.value).splitlines()
    assert told == (
        "x: its tensors are not of the family wan2.2: they fit wan2.1 or qwen-image. "
        "--family wan2.1 or --family qwen-image reads it so."
    )
    assert "wan2.2-original: no tensor named" in candidates[0] and "wan2.2-diffusers" in candidates[1]
    with pytest.raises(SpecError, match="unknown family 'wan3'"):
        recognise(shapes, family="wan3")


def test_released_student_has_the_original_layout() -> None:
    assert recognise(released_shapes()).name == "wan-original"
    assert present_roles(released_shapes(), LAYOUTS["wan-original"]) == ("decoder",)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (
            {
                "decoder.mid.block_1.conv1.conv.weight": (8, 8, 3, 3, 3),
                "decoder.mid.attn_1.to_q.weight": (8, 8),
            },
            "HunyuanVideo",
        ),
        ({"decoder.mid_block.resnets.0.norm1.conv_y.conv.weight": (8, 8, 1, 1, 1)}, "CogVideoX"),
        ({"decoder.mid.block_1.norm1.weight": (8,), "decoder.conv_in.weight": (8, 4, 3, 3)}, "images"),
        ({"decoder.1.weight": (8, 8, 3, 3), "encoder.0.weight": (8, 8, 3, 3)}, "tiny autoencoder"),
        ({"blocks.0.self_attn.q.weight": (8, 8)}, "diffusion transformer"),
        ({"model.diffusion_model.x": (1,)}, "diffusion model"),
        ({"decoder.mid.block_1.conv1.conv.weight": (8, 8, 3, 3), "decoder.mid.x": (8,)}, "LTX-2's VAE for sound"),
        ({"blocks.0.self_attn.q.lora_A.weight": (8, 8)}, "LoRA"),
    ],
)
def test_other_models_are_named(shapes: dict, what: str) -> None:
    with pytest.raises(ArtifactError, match=rf"x: looks like .*{what}[\s\S]*families wan2\.1"):
        recognise(shapes, "x")


def test_unknown_names_list_the_candidates() -> None:
    with pytest.raises(ArtifactError) as caught:
        recognise({"some.weight": (1,)}, "x")
    text = str(caught.value)
    assert "wan-original, wan2.2-original, qwen-original: no tensor named decoder.middle.0.residual.0.gamma" in text
    assert "  diffusers, wan2.2-diffusers, qwen-diffusers, " in text
    assert (
        "qwen-image-2-original, hunyuanvideo-1.5-diffusers: no tensor named decoder.mid_block.resnets.0.norm1" in text
    )
    with pytest.raises(ArtifactError, match="0 tensors"):
        recognise({})


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["vae.a", "vae.b"], "vae."),
        (["module.first_stage_model.a"], "module.first_stage_model."),
        (["vae.a", "b"], ""),
        ([], ""),
    ],
)
def test_common_prefix(names: list[str], prefix: str) -> None:
    assert common_prefix(dict.fromkeys(names)) == prefix
