"""LTX-Video files: recognised by the places of their blocks, and read with their configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.coders import coders_from_foreign
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.artifact.foreign.recognition import present_roles, recognise, twins
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.ltx.names import fold_timestep
from flashvaed_cli.families.registry import LAYOUTS, get_family, original_layout
from tests.ltx_toy import VERSIONS, flash_ltx_spec, ltx_decoder, ltx_spec

ONES = torch.ones(4)
LTX_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout.family.startswith("ltx")]


def tensors_of(spec: DecoderSpec, layout: str) -> dict[str, Tensor]:
    return to_foreign(ltx_decoder(spec).state_dict(), spec, LAYOUTS[layout])


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", LTX_LAYOUTS)
def test_layouts_are_recognised(name: str) -> None:
    layout = LAYOUTS[name]
    for make in (ltx_spec, flash_ltx_spec):
        tensors = tensors_of(make(layout.family), name)
        assert recognise(shapes_of(tensors)) is layout
        assert present_roles(shapes_of(tensors), layout) == ("decoder",)
        del tensors[next(name for name in tensors if "conv1" in name)]
        assert recognise(shapes_of(tensors)) is layout


def test_encoders_that_two_versions_share_are_ambiguous() -> None:
    """0.9.0 and 0.9.1 have the same encoder: without a decoder the version is unknown."""
    spec = get_family(VERSIONS[0]).encoder_spec(4, 4)
    tensors = to_foreign(Encoder(spec).state_dict(), spec, LAYOUTS["ltx-0.9.0-diffusers"])  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"fit ltx-0\.9\.0-diffusers, ltx-0\.9\.1-diffusers equally well"):
        recognise(shapes_of(tensors))
    assert recognise(shapes_of(tensors), family=VERSIONS[1]).name == "ltx-0.9.1-diffusers"


@pytest.mark.parametrize("style", ["original", "diffusers"])
@pytest.mark.parametrize(("taken", "other"), [("ltx-video-0.9.5", "ltx-2"), ("ltx-2", "ltx-video-0.9.5")])
def test_norms_tell_0_9_5_from_2(style: str, taken: str, other: str) -> None:
    name = f"{taken.replace('-video', '')}-{style}"
    shapes = shapes_of(tensors_of(ltx_spec(taken), name))
    assert twins(LAYOUTS[name]) == ()
    with pytest.raises(ArtifactError, match=f"not of the family {other}: they fit {taken}.*[\\s\\S]*conditioned"):
        recognise(shapes, family=other)
    wrong_class = next(at.config_class for at in LAYOUTS.values() if at.family == other and at.config_class)
    with pytest.raises(ArtifactError, match=f"not of {wrong_class}, as its configuration says: they fit {taken}"):
        recognise(shapes, config_class=wrong_class)


def test_encoders_of_0_9_5_and_2_are_ambiguous() -> None:
    spec = get_family("ltx-2").encoder_spec(4, 4)
    tensors = to_foreign(Encoder(spec).state_dict(), spec, LAYOUTS["ltx-2-original"])  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"with --family ltx-video-0\.9\.5 or --family ltx-2"):
        recognise(shapes_of(tensors))


@pytest.mark.parametrize("group", ["ltx", "ltx-video"])
@pytest.mark.parametrize("version", [*VERSIONS, "ltx-2", "ltx-2.3"])
def test_a_group_leaves_the_version_to_the_tensors(version: str, group: str) -> None:
    shapes = shapes_of(tensors_of(ltx_spec(version), f"{version.replace('-video', '')}-original"))
    if version.startswith("ltx-2") and group == "ltx-video":
        with pytest.raises(ArtifactError, match=f"they fit {version}"):
            recognise(shapes, family=group)
    else:
        assert recognise(shapes, family=group).family == version


def test_a_group_names_artifacts_too(tmp_path: Path) -> None:
    from artifact_specs import small_decoder

    header = ArtifactHeader(kind="decoder", family="wan2.1", latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)
    save_checkpoint(tmp_path / "x.safetensors", header, decoder=small_decoder())
    with pytest.raises(ArtifactError, match=r"an artifact of the family wan2\.1, not ltx"):
        load_checkpoint(tmp_path / "x.safetensors", builtins={}, family="ltx")


def test_unknown_versions_say_why_each_candidate_failed() -> None:
    """A decoder with two up stages, as no release has."""
    tensors = tensors_of(ltx_spec(VERSIONS[2]), "ltx-0.9.5-original")
    kept = {name: tensor for name, tensor in tensors.items() if "up_blocks.0." in name or "conv_in" in name}
    with pytest.raises(ArtifactError) as caught:
        recognise(shapes_of(kept), "x")
    text = str(caught.value)
    assert re.search(r"ltx-0\.9\.5-original.*: no tensor named decoder\.up_blocks\.1\.", text)
    assert re.search(r"ltx-0\.9\.0-diffusers.*: no tensor named decoder\.mid_block\.resnets\.0\.", text)
    assert "names of an LTX-Video VAE" in text


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_exported_student_loads_again(version: str, causal: bool, tmp_path: Path) -> None:
    """Pruned and converted: gains, folded residuals and causality are in the file or its configuration."""
    spec = flash_ltx_spec(version, causal=causal)
    decoder = ltx_decoder(spec)
    tensors = to_foreign(decoder.state_dict(), spec, original_layout(version))
    metadata = {
        "config": json.dumps(get_family(version).described(spec)),
        "latents_mean": "[0, 0, 0, 0]",
        "latents_std": "[1, 1, 1, 1]",
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", metadata)
    found = load_checkpoint(tmp_path / "x.safetensors", builtins={})
    assert found.decoder is not None and found.decoder.spec == spec
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in found.decoder.state_dict().items())


def test_a_length_that_begins_like_a_pickle(tmp_path: Path) -> None:
    """The first byte of a safetensors file is the lowest of its index's length: it may be anything."""
    tensors = tensors_of(ltx_spec(), "ltx-0.9.0-original")
    metadata = {"latents_mean": "[0, 0, 0, 0]", "latents_std": "[1, 1, 1, 1]"}
    path = tmp_path / "x.safetensors"
    for extra in range(0, 512, 8):
        save_file(tensors, path, {**metadata, "note": "x" * extra})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_checkpoint(path, builtins={}).latent_std == (1, 1, 1, 1)


def test_a_file_without_statistics_takes_raw_latents_only(tmp_path: Path) -> None:
    spec = ltx_spec()
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(spec, "ltx-0.9.0-original").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = load_checkpoint(tmp_path / "x.safetensors", builtins={})
    assert (found.latent_mean, found.latent_std, found.latent_width) == ((), (), 4)
    note, padding = found.notes
    assert padding.startswith("nothing in it says how its decoder pads frames")
    assert note.startswith("no latent statistics (per_channel_statistics.*") and note.endswith(
        "only raw latents can be read"
    )
    with pytest.raises(ArtifactError, match=r"--latent-scale raw.*a checkpoint that has them"):
        found.require_statistics()
    save_checkpoint(tmp_path / "ours.safetensors", derived_header(found), decoder=found.require_decoder())
    ours = load_checkpoint(tmp_path / "ours.safetensors", builtins={})
    assert ours.latent_mean == () and ours.notes == ()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("version", [VERSIONS[0], "ltx-2"])
def test_assumptions_about_bare_weights_are_reported_and_can_be_replaced(
    version: str, suffix: str, tmp_path: Path
) -> None:
    spec = ltx_spec(version)
    tensors = tensors_of(spec, original_layout(version).name)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors |= {"per_channel_statistics.mean-of-means": torch.zeros(4), "per_channel_statistics.std-of-means": ONES}
    path = tmp_path / f"x.{suffix}"
    torch.save(tensors, path) if suffix == "pth" else save_file(tensors, path)
    bare = load_checkpoint(path, builtins={})
    (note,) = bare.notes
    assert "centred in time (decoder_causal false)" in note and ("mirrored" in note) == (version == "ltx-2")
    assert not bare.require_decoder().spec.is_causal
    for causal in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"decoder_causal": causal}))
        told = load_checkpoint(tmp_path, builtins={})
        assert (told.notes, told.require_decoder().spec.is_causal) == ((), causal)


@pytest.mark.parametrize("statistics", [True, False])
def test_a_whole_model_is_read_as_its_vae_is(statistics: bool, tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in tensors_of(ltx_spec(), "ltx-0.9.0-original").items()}
    if statistics:
        tensors |= {"per_channel_statistics.mean-of-means": torch.zeros(4), "per_channel_statistics.std-of-means": ONES}
    whole = {f"vae.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"model.diffusion_model.transformer_blocks.0.attn1.to_q.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "vae.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    alone, found = (load_checkpoint(tmp_path / f"{name}.safetensors", builtins={}) for name in ("vae", "whole"))
    assert (found.notes, found.latent_std) == (alone.notes, (1,) * 4 if statistics else ())
    assert found.require_decoder().spec == alone.require_decoder().spec


def test_half_of_the_statistics_is_named(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(ltx_spec(), "ltx-0.9.0-original").items()}
    save_file(tensors, tmp_path / "x.safetensors", {"latents_std": "[1, 1, 1, 1]"})
    with pytest.raises(ArtifactError, match=r"its metadata has only latents_std of latents_mean"):
        load_checkpoint(tmp_path / "x.safetensors", builtins={})
    save_file({**tensors, "per_channel_statistics.mean-of-means": torch.zeros(4)}, tmp_path / "y.safetensors")
    with pytest.raises(ArtifactError, match=r"mean-of-means but not per_channel_statistics\.std-of-means"):
        load_checkpoint(tmp_path / "y.safetensors", builtins={})


def test_students_name_their_layers_without_the_inner_conv() -> None:
    """As in the released Wan student: another module replaces the causal layer."""
    spec = flash_ltx_spec(VERSIONS[0])
    decoder = ltx_decoder(spec)
    tensors = to_foreign(decoder.state_dict(), spec, original_layout(VERSIONS[0]))
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_changed = (
            "depthwise_conv" in name or "pointwise_conv" in name or (".conv1.conv." in name and "up_blocks.9" in name)
        )
        renamed[name.replace(".conv.", ".") if is_changed else name] = tensor
    assert renamed.keys() != tensors.keys()
    layout = recognise(shapes_of(renamed))
    config = get_family(VERSIONS[0]).described(spec)
    found = coders_from_foreign(renamed, layout, config=config)["decoder"]
    assert isinstance(found, Decoder) and found.spec == spec
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in found.state_dict().items())


def test_the_released_student_pads_its_depthwise_layers_causally(tmp_path: Path) -> None:
    """Its names are `conv1.depthwise.*` and `conv1.pointwise.*`; dense layers stay centred."""
    name = VERSIONS[0]
    centred = flash_ltx_spec(name)
    layers = {address: layer for address, layer in centred.layers() if layer.operator == "dwsep3d"}
    spec = centred
    for address, block in centred.blocks():
        update = {
            part: layer.model_copy(update={"time_padding": "first"})
            for part in ("conv1", "conv2")
            if (layer := layers.get(f"{address}.{part}")) is not None
        }
        spec = spec.with_blocks({address: block.model_copy(update=update)}) if update else spec
    decoder = ltx_decoder(spec)
    renamed: dict[str, Tensor] = {"mean_of_means": torch.zeros(4), "std_of_means": ONES}
    for key, tensor in to_foreign(decoder.state_dict(), spec, original_layout(name)).items():
        for part in ("depthwise", "pointwise"):
            key = key.replace(f".conv.{part}_conv.", f".{part}.")
        renamed[key] = tensor.contiguous()
        if key.endswith("depthwise.weight"):
            renamed[key.replace("weight", "bias")] = torch.zeros(len(tensor))
    torch.save(renamed, tmp_path / "Flash_VAED_LTX.pth")
    found = load_checkpoint(tmp_path / "Flash_VAED_LTX.pth", builtins={})
    assert found.require_decoder().spec == spec != centred and found.latent_std == (1,) * 4
    latents = torch.randn(1, 4, 4, 2, 2)
    torch.testing.assert_close(decode(found.require_decoder(), latents), decode(decoder, latents), rtol=0, atol=1e-5)
    assert (decode(ltx_decoder(centred), latents) - decode(decoder, latents)).abs().max() > 1e-2
    tensors = to_foreign(found.require_decoder().state_dict(), spec, original_layout(name))
    config = get_family(name).described(spec)
    again = coders_from_foreign(tensors, original_layout(name), config=config)["decoder"]
    assert again.spec == spec


def test_a_condition_without_its_partner_is_named() -> None:
    tensors = tensors_of(ltx_spec(VERSIONS[0]), "ltx-0.9.0-diffusers")
    tensors["decoder.timestep_scale_multiplier"] = torch.tensor(1000.0)
    tensors["decoder.mid_block.resnets.0.scale_shift_table"] = torch.zeros(4, 16)
    assert fold_timestep(tensors, 0.05).keys() == tensors.keys() - {"decoder.timestep_scale_multiplier"}
    with pytest.raises(ArtifactError, match=r"1 unexpected: decoder\.mid_block.resnets.0.scale_shift_table"):
        coders_from_foreign(tensors, LAYOUTS["ltx-0.9.0-diffusers"])
