from __future__ import annotations

import pytest
from artifact_specs import DECODER_SPEC, ENCODER_SPEC, flash_spec, released_shapes

from flashvaed_cli.artifact.layouts import slots
from flashvaed_cli.artifact.recognition import common_prefix, present_roles, recognise
from flashvaed_cli.artifact.wan_keys import LAYOUTS
from flashvaed_cli.decoders.wan import wan_decoder_spec
from flashvaed_cli.errors import ArtifactError


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_told_apart(name: str) -> None:
    layout = LAYOUTS[name]
    for spec in (DECODER_SPEC, ENCODER_SPEC, flash_spec()):
        shapes = {slot.foreign: slot.shape for slot in slots(spec, layout)}
        assert recognise(shapes) is layout
        assert present_roles(shapes, layout) == (spec.role,)
        del shapes[next(iter(shapes))]
        assert recognise(shapes) is layout


def test_released_student_has_the_original_layout() -> None:
    assert recognise(released_shapes()).name == "wan-original"
    assert present_roles(released_shapes(), LAYOUTS["wan-original"]) == ("decoder",)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"decoder.upsamples.0.upsamples.0.residual.2.weight": (8, 8, 3, 3, 3)}, "Wan 2.2"),
        ({"decoder.up_blocks.0.upsampler.resample.1.weight": (8, 8, 3, 3)}, "Wan 2.2"),
        ({slot.foreign: slot.shape for slot in slots(wan_decoder_spec(4, 48), LAYOUTS["diffusers"])}, "Wan 2.2"),
        ({"per_channel_statistics.mean-of-means": (128,)}, "LTX"),
        ({"latents_mean": (128,), "decoder.conv_in.conv.weight": (8, 128, 3, 3, 3)}, "LTX"),
        ({"decoder.mid.block_1.conv1.conv.weight": (8, 8, 3, 3, 3)}, "HunyuanVideo"),
        ({"decoder.mid_block.resnets.0.norm1.conv_y.conv.weight": (8, 8, 1, 1, 1)}, "CogVideoX"),
        ({"decoder.mid.block_1.norm1.weight": (8,), "decoder.conv_in.weight": (8, 4, 3, 3)}, "images"),
        ({"decoder.1.weight": (8, 8, 3, 3), "encoder.0.weight": (8, 8, 3, 3)}, "tiny autoencoder"),
        ({"blocks.0.self_attn.q.weight": (8, 8)}, "diffusion transformer"),
        ({"model.diffusion_model.x": (1,), "first_stage_model.decoder.conv1.weight": (1,)}, "all-in-one"),
        ({"blocks.0.self_attn.q.lora_A.weight": (8, 8)}, "LoRA"),
    ],
)
def test_other_models_are_named(shapes: dict, what: str) -> None:
    with pytest.raises(ArtifactError, match=rf"x: looks like .*{what}[\s\S]*reads Wan 2\.1"):
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
