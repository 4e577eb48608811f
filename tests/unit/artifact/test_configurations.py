"""Every key of a configuration is read, checked against the tensors, or refused by name; none is silently ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifact_specs import ENCODER_SPEC, filled, small_decoder
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.spec.blocks import ShuffleUpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.registry import FAMILIES, LAYOUTS, get_family
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS
from tests.ltx_configs import FAMILIES as LTX_FAMILIES
from tests.ltx_configs import ltx_config
from tests.ltx_toy import ltx_decoder

WAN_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.35.0",
    "attn_scales": [],
    "base_dim": 4,
    "clip_output": False,
    "decoder_base_dim": None,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "in_channels": 3,
    "is_residual": False,
    "num_res_blocks": 2,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
RES_X_090 = [["res_x", 4], ["compress_all", 1], ["res_x_y", 1], ["res_x", 3], ["compress_all", 1], ["res_x_y", 1]]
OWN_BLOCKS: dict[str, dict[str, Any]] = {
    "0.9.0": {"blocks": [*RES_X_090, ["res_x", 3], ["compress_all", 1], ["res_x", 3], ["res_x", 4]]},
    "0.9.1": {
        "encoder_blocks": [
            *[["res_x", {"num_layers": 4}], ["compress_all", {}], ["res_x_y", 1]],
            *[["res_x", {"num_layers": 3}], ["compress_all", {}], ["res_x_y", 1]],
            *[["res_x", {"num_layers": 3}], ["compress_all", {}], ["res_x", {"num_layers": 3}]],
            ["res_x", {"num_layers": 4}],
        ],
        "decoder_blocks": [
            *[["res_x", {"num_layers": 5, "inject_noise": True}], ["compress_all", {"residual": True}]],
            *[["res_x", {"num_layers": 6, "inject_noise": True}], ["compress_all", {"residual": True}]],
            *[["res_x", {"num_layers": 7, "inject_noise": True}], ["compress_all", {"residual": True}]],
            ["res_x", {"num_layers": 8, "inject_noise": False}],
        ],
    },
    "0.9.5": {
        "encoder_blocks": [
            *[["res_x", {"num_layers": 4}], ["compress_space_res", {"multiplier": 2}]],
            *[["res_x", {"num_layers": 6}], ["compress_time_res", {"multiplier": 2}]],
            *[["res_x", {"num_layers": 6}], ["compress_all_res", {"multiplier": 2}]],
            *[["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 2}]],
            ["res_x", {"num_layers": 2}],
        ],
        "decoder_blocks": [
            *([["res_x", {"num_layers": 5, "inject_noise": False}], ["compress_all", {"residual": True}]] * 3),
            ["res_x", {"num_layers": 5, "inject_noise": False}],
        ],
    },
}
OWN_CONFIG = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
}


def load(path: Path) -> Checkpoint:
    return load_checkpoint(path, builtins={})


def write_folder(folder: Path, tensors: dict, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wan_folder(folder: Path, **changes: Any) -> Path:
    encoder = filled(Encoder(ENCODER_SPEC))
    tensors = to_foreign(encoder.state_dict(), ENCODER_SPEC, WAN_DIFFUSERS)
    decoder = small_decoder()
    tensors |= to_foreign(decoder.state_dict(), decoder.spec, WAN_DIFFUSERS)
    return write_folder(folder, tensors, {**WAN_CONFIG, **changes})


def ltx_tensors(version: str, style: str, *, with_encoder: bool = True) -> dict:
    family = get_family(LTX_FAMILIES[version])
    layout = LAYOUTS[f"ltx-{version}-{style}"]
    decoder = ltx_decoder(family.decoder_spec(4, 4))
    tensors = to_foreign(decoder.state_dict(), decoder.spec, layout)
    spec: CoderSpec = family.encoder_spec(4, 4)
    return tensors | (to_foreign(filled(Encoder(spec)).state_dict(), spec, layout) if with_encoder else {})  # type: ignore[arg-type]


def ltx_folder(folder: Path, version: str, **changes: Any) -> Path:
    config = {"_class_name": "AutoencoderKLLTX2Video" if version.startswith("2") else "AutoencoderKLLTXVideo"}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return write_folder(
        folder, ltx_tensors(version, "diffusers"), {**config, **ltx_config(version, 4, 4), **statistics, **changes}
    )


def ltx_file(path: Path, version: str, *, statistics: bool = True, with_encoder: bool = True, **config: Any) -> Path:
    tensors = ltx_tensors(version, "original", with_encoder=with_encoder)
    metadata = {"config": json.dumps({"vae": config})} if config else {}
    if statistics:
        metadata |= {"latents_mean": "[0, 0, 0, 0]", "latents_std": "[1, 1, 1, 1]"}
    save_file({f"vae.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_declares_its_configuration(name: str) -> None:
    keys = FAMILIES[name].config_keys
    assert keys.fixed, "config_keys.fixed is empty: a configuration of another network would be read"
    assert set(keys.widths) == {"decoder", "encoder"}
    assert not (keys.read & (frozenset(keys.fixed) | keys.idle))


def test_a_whole_configuration_of_wan_is_known(tmp_path: Path) -> None:
    assert load(wan_folder(tmp_path)).notes == ()


def test_keys_that_are_not_known_are_noted(tmp_path: Path) -> None:
    (note,) = load(wan_folder(tmp_path, use_tail_norm=True, block_shape=[1])).notes
    assert note.endswith("which are ignored: use_tail_norm, block_shape")


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("dim_mult", [1, 2, 4, 8], r"\[1, 2, 4, 4\]"),
        ("num_res_blocks", 3, "2"),
        ("attn_scales", [1.0], r"\[\]"),
        ("temperal_downsample", [True, True, False], r"\[false, true, true\]"),
        ("is_residual", True, "false"),
        ("in_channels", 4, "3"),
        ("out_channels", 12, "3"),
        ("patch_size", 2, "null or 1"),
    ],
)
def test_another_network_than_wans_is_refused(tmp_path: Path, key: str, value: object, supported: str) -> None:
    with pytest.raises(ArtifactError, match=rf"{key} is .*; supported for wan2\.1: {supported}\."):
        load(wan_folder(tmp_path, **{key: value}))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"num_res_blocks is 3.*; z_dim is 8; the weights have 16\."):
        load(wan_folder(tmp_path, num_res_blocks=3, z_dim=8))


@pytest.mark.parametrize("version", LTX_FAMILIES)
def test_whole_configurations_of_ltx_are_known(tmp_path: Path, version: str) -> None:
    assert load(ltx_folder(tmp_path, version)).notes == ()


@pytest.mark.parametrize("version", OWN_BLOCKS)
def test_ltx_own_configurations_are_known(tmp_path: Path, version: str) -> None:
    conditioned = {} if version == "0.9.0" else {"timestep_conditioning": True}
    config = {**OWN_CONFIG, **OWN_BLOCKS[version], **conditioned}
    checkpoint = load(ltx_file(tmp_path / "x.safetensors", version, **config))
    assert checkpoint.notes == ()
    assert checkpoint.require_decoder().spec == get_family(LTX_FAMILIES[version]).decoder_spec(4, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size_t", 2, "is 2; supported for ltx-video-0.9.5: 1"),
        ("patch_size", 2, "is 2; supported for ltx-video-0.9.5: 4"),
        ("resnet_norm_eps", 1e-3, "is 0.001; supported for ltx-video-0.9.5: 1e-06"),
        ("downsample_type", ["spatial", "spatial", "temporal", "temporal"], "supported for ltx-video-0.9.5"),
        ("spatio_temporal_scaling", [True, True, True, False], "supported for ltx-video-0.9.5"),
        ("decoder_spatio_temporal_scaling", [True, True, False], "supported for ltx-video-0.9.5"),
        ("layers_per_block", [4, 6, 6, 2, 3], "supported for ltx-video-0.9.5"),
        ("decoder_layers_per_block", [5, 6, 7, 8], "supported for ltx-video-0.9.5"),
        ("upsample_factor", [2, 2, 1], "supported for ltx-video-0.9.5"),
        ("down_block_types", ["LTXVideoDownBlock3D"] * 4, "supported for ltx-video-0.9.5"),
        ("temporal_compression_ratio", 4, "supported for ltx-video-0.9.5: null or 8"),
        ("decoder_inject_noise", [True, False, False, False], "the weights have \\[false, false, false, false\\]"),
        ("latent_channels", 8, "is 8; the weights have 4"),
        ("timestep_conditioning", False, "is false, but the norms .* ltx-video-0.9.5, are conditioned"),
        ("encoder_causal", "yes", "is 'yes'; supported: true, false"),
        ("decoder_causal", 1, "is 1; supported: true, false"),
        ("decoder_spatial_padding_mode", "replicate", "is 'replicate'; supported: zeros, reflect"),
        ("encoder_spatial_padding_mode", "circular", "is 'circular'; supported: zeros, reflect"),
        ("spatial_padding_mode", "replicate", "is 'replicate'; supported: zeros, reflect"),
        ("upsample_residual", [True], "supported: true, false or 3 of them"),
        ("block_out_channels", [4, 8, 16, 32, 32], "supported for ltx-video-0.9.5: widths as 1 : 2 : 4 : 8 : 16"),
        ("decoder_block_out_channels", [16, 32, 64], "so 4 -> 64 channels in decoder conv_in"),
        ("decode_timestep", "soon", "is 'soon', which is not a number"),
    ],
)
def test_another_network_than_ltxs_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"{key}.*{message}"):
        load(ltx_folder(tmp_path, "0.9.5", **{key: value}))


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("0.9.0", {"norm_layer": "group_norm"}, "norm_layer is group_norm; supported for ltx-video-0.9.0: pixel_norm"),
        ("0.9.0", {"spatial_padding_mode": "replicate"}, "spatial_padding_mode is 'replicate'; supported: zeros"),
        ("0.9.0", {"timestep_conditioning": True}, "timestep_conditioning is true, but the norms .* are not"),
        ("0.9.0", {"blocks": [["res_x", 4], ["attn", {}]]}, "blocks run as attn, res_x 4; supported for .*: res_x 4"),
        ("0.9.0", {"blocks": 7}, r"blocks is '7'; supported: a list of \[name, parameters\]"),
        ("0.9.5", {"decoder_blocks": OWN_BLOCKS["0.9.1"]["decoder_blocks"]}, "decoder_blocks run as res_x 8"),
        ("0.9.5", {"encoder_blocks": OWN_BLOCKS["0.9.1"]["encoder_blocks"]}, "encoder_blocks run as res_x 4"),
    ],
)
def test_ltx_own_configurations_are_checked(tmp_path: Path, version: str, changes: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(ltx_file(tmp_path / "x.safetensors", version, **{**OWN_CONFIG, **changes}))


def test_noise_that_the_tensors_lack_is_a_contradiction(tmp_path: Path) -> None:
    noisy = [[name, {**params, "inject_noise": True}] for name, params in OWN_BLOCKS["0.9.5"]["decoder_blocks"]]
    with pytest.raises(ArtifactError, match=r"decoder_blocks is inject_noise \[True, True, True, True\]; the weights"):
        load(ltx_file(tmp_path / "x.safetensors", "0.9.5", decoder_blocks=noisy))


def test_residuals_of_a_configuration_are_read(tmp_path: Path) -> None:
    """LTX lists its decoder from the frames back to the latents."""
    blocks = json.loads(json.dumps(OWN_BLOCKS["0.9.5"]["decoder_blocks"]))
    blocks[1][1]["residual"] = False
    own = load(ltx_file(tmp_path / "x.safetensors", "0.9.5", decoder_blocks=blocks))
    theirs = load(ltx_folder(tmp_path / "vae", "0.9.5", upsample_residual=[False, True, True]))
    for checkpoint in (own, theirs):
        ups = [b for _, b in checkpoint.require_decoder().spec.blocks() if isinstance(b, ShuffleUpsampleSpec)]
        assert [block.residual for block in ups] == [True, True, False]


@pytest.mark.parametrize(
    ("config", "decoder", "encoder"),
    [
        ({}, "reflect", "zeros"),
        ({"spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"spatial_padding_mode": "reflect"}, "reflect", "reflect"),
        ({"spatial_padding_mode": "reflect", "encoder_spatial_padding_mode": "zeros"}, "reflect", "zeros"),
        ({"decoder_spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "reflect"}, "zeros", "reflect"),
    ],
)
def test_each_role_has_its_padding(tmp_path: Path, config: dict, decoder: str, encoder: str) -> None:
    checkpoint = load(ltx_file(tmp_path / "x.safetensors", "2", **config))
    for coder, expected in ((checkpoint.require_decoder(), decoder), (checkpoint.require_encoder(), encoder)):
        assert {layer.space_padding for _, layer in coder.spec.layers() if layer.kernel[1:] != (1, 1)} == {expected}


@pytest.mark.parametrize(("changes", "causal"), [({}, True), ({"decoder_causal": False}, False)])
def test_the_defaults_of_diffusers_for_ltx_2(tmp_path: Path, changes: dict, causal: bool) -> None:
    """Its class is causal by default; LTX's own code, and so the released files, are not."""
    assert load(ltx_folder(tmp_path / "vae", "2", **changes)).require_decoder().spec.is_causal == causal
    assert not load(ltx_file(tmp_path / "x.safetensors", "2")).require_decoder().spec.is_causal


def test_a_described_vae_reads_back() -> None:
    family = get_family("ltx-2")
    config = {"encoder_causal": False, "encoder_spatial_padding_mode": "reflect", "spatial_padding_mode": "zeros"}
    decoder = family.configured(family.decoder_spec(4, 4), {**config, "causal_decoder": True})
    encoder = family.configured(family.encoder_spec(4, 4), config)
    both = {**family.described(decoder), **family.described(encoder)}
    assert family.configured(family.decoder_spec(4, 4), both) == decoder
    assert family.configured(family.encoder_spec(4, 4), both) == encoder


def test_a_configuration_beside_weights_adds_to_that_in_their_metadata(tmp_path: Path) -> None:
    file = ltx_file(tmp_path / "x.safetensors", "0.9.5", upsample_residual=False, causal_decoder=False)
    assert not load(file).require_decoder().spec.is_causal
    (tmp_path / "config.json").write_text('{"decoder_causal": true}')
    spec = load(tmp_path).require_decoder().spec
    assert spec.is_causal and not any(b.residual for _, b in spec.blocks() if isinstance(b, ShuffleUpsampleSpec))
    assert load(tmp_path).latent_std == (1.0,) * 4


def test_timestep_nought_is_a_timestep(tmp_path: Path) -> None:
    decoder = load(ltx_file(tmp_path / "x.safetensors", "0.9.5", decode_timestep=0)).require_decoder()
    assert isinstance(decoder, Decoder) and decoder.spec.decode_timestep == 0.0


def test_another_programs_notes_are_not_wans_configuration(tmp_path: Path) -> None:
    decoder = small_decoder()
    tensors = to_foreign(decoder.state_dict(), decoder.spec, LAYOUTS["wan-original"])
    metadata = {"config": json.dumps({"vae": {"num_res_blocks": 7}})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", metadata)
    assert load(tmp_path / "x.safetensors").notes == ()
