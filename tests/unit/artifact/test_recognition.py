from __future__ import annotations

import pytest
from artifact_specs import DECODER_SPEC, released_shapes, specs_of

from flashvaed_cli.artifact.key_tables import LAYOUTS
from flashvaed_cli.artifact.layouts import Layout, slots
from flashvaed_cli.artifact.recognition import common_prefix, present_roles, recognise, twins
from flashvaed_cli.errors import ArtifactError, SpecError

WAN_LAYOUTS = [layout for layout in LAYOUTS.values() if layout.family in ("wan2.1", "wan2.2", "qwen-image")]


@pytest.mark.parametrize("layout", WAN_LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_told_apart(layout: Layout) -> None:
    for spec in specs_of(layout.family).values():
        shapes = {slot.foreign: slot.shape for slot in slots(spec, layout)}
        found = recognise(shapes)
        assert found.places == layout.places
        assert found is layout or (layout.family, found.family) == ("qwen-image", "wan2.1")
        assert recognise(shapes, family=layout.family) is layout
        assert present_roles(shapes, layout) == (spec.role,)
        del shapes[next(iter(shapes))]
        assert recognise(shapes, family=layout.family) is layout


def test_equal_keys_are_told_apart_by_the_configuration_only() -> None:
    shapes = {slot.foreign: slot.shape for slot in slots(DECODER_SPEC, LAYOUTS["diffusers"])}
    assert recognise(shapes).family == "wan2.1"
    assert twins(LAYOUTS["diffusers"]) == ("qwen-image",) and twins(LAYOUTS["wan2.2-diffusers"]) == ()
    assert recognise(shapes, config_class="AutoencoderKLQwenImage").name == "qwen-diffusers"
    assert recognise(shapes, config_class="AutoencoderKLWan").name == "diffusers"
    with pytest.raises(ArtifactError, match=r"is of AutoencoderTiny; this version reads .*AutoencoderKLQwenImage"):
        recognise(shapes, config_class="AutoencoderTiny")


def test_a_family_that_the_names_contradict_is_refused() -> None:
    shapes = {slot.foreign: slot.shape for slot in slots(DECODER_SPEC, LAYOUTS["wan-original"])}
    with pytest.raises(ArtifactError, match=r"of the family wan2\.2 .*[\s\S]*wan2\.2-original: no tensor named"):
        recognise(shapes, family="wan2.2")
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
        ({"model.diffusion_model.x": (1,), "first_stage_model.decoder.conv1.weight": (1,)}, "all-in-one"),
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
    assert "wan-original: no tensor named decoder.middle.0.residual.0.gamma" in text
    assert "diffusers: no tensor named decoder.mid_block.resnets.0.norm1.gamma" in text
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
