"""Our Stable Diffusion VAEs against diffusers' `AutoencoderKL`: same random weights, float32, same numbers.

The bound of 1e-4 of the output's range leaves room for float32 sums in another order (4e-7 is measured on the toys).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.light import LightShape, light_spec
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.families.registry import class_layout, get_family, original_layout, original_like
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.commands import invoke, succeed
from tests.kl_toys import VARIANTS, kl_config, random_kl
from tests.parity.oracles import share_of_range
from tests.toy import kept_of, toy_decoder

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4


def saved(oracle: nn.Module, folder: Path) -> Checkpoint:
    oracle.save_pretrained(folder)  # type: ignore[operator]
    return load_checkpoint(folder, builtins={})


def as_images(clip: Tensor) -> Tensor:
    """`[B, C, T, H, W]` to `[BT, C, H, W]`."""
    return clip.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def assert_parity(oracle: nn.Module, found: Checkpoint, *, num_frames: int, height: int, width: int) -> None:
    """Encoder and decoder, the latter on the oracle's latents, and normalized latents as pipelines make them."""
    pixels = torch.rand(2, 3, num_frames, height, width) * 2 - 1
    expected_latents = oracle.encode(as_images(pixels)).latent_dist.mode()  # type: ignore[operator]
    latents = encode(found.require_encoder(), pixels)
    clip = expected_latents.unflatten(0, (2, num_frames)).transpose(1, 2)
    expected = oracle.decode(expected_latents).sample  # type: ignore[operator]
    frames = found.require_decoder()(clip)
    assert latents.shape[2] == frames.shape[2] == num_frames
    errors = share_of_range(as_images(latents), expected_latents), share_of_range(as_images(frames), expected)
    print(f"{num_frames} frames of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    assert max(errors) <= RANGE_BOUND
    config = oracle.config
    mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in found.require_statistics())
    scaled = (expected_latents - (config.shift_factor or 0.0)) * config.scaling_factor  # type: ignore[union-attr]
    torch.testing.assert_close((expected_latents - mean) / std, scaled)


@pytest.mark.parametrize("name", VARIANTS)
def test_small(name: str, tmp_path: Path) -> None:
    oracle = random_kl(kl_config(name))
    found = saved(oracle, tmp_path)
    assert (found.family, found.notes) == (name, ())
    for num_frames, height, width in ((1, 48, 32), (3, 16, 40)):
        assert_parity(oracle, found, num_frames=num_frames, height=height, width=width)


@pytest.mark.bench
@pytest.mark.parametrize("name", ["stable-diffusion", "flux.1"])
def test_full_size(name: str, tmp_path: Path) -> None:
    oracle = random_kl(kl_config(name, 128, 32))
    found = saved(oracle, tmp_path)
    family = get_family(name)
    assert found.require_decoder().spec == family.decoder_spec(128, family.latent_width)
    assert found.require_encoder().spec == family.encoder_spec(128, family.latent_width)
    assert_parity(oracle, found, num_frames=2, height=256, width=256)


@pytest.mark.parametrize("has_quant", [False, True])
@pytest.mark.parametrize("name", ["stable-diffusion", "flux.1"])
def test_layers_beside_the_latent_are_as_the_file_has_them(name: str, has_quant: bool, tmp_path: Path) -> None:
    oracle = random_kl(kl_config(name, use_quant_conv=has_quant, use_post_quant_conv=has_quant))
    found = saved(oracle, tmp_path)
    stages = {stage.name for coder in (found.decoder, found.encoder) if coder for stage in coder.spec.stages}
    assert {"post_quant", "quant"} <= stages if has_quant else not {"post_quant", "quant"} & stages
    assert_parity(oracle, found, num_frames=2, height=16, width=24)


def test_frames_do_not_know_each_other() -> None:
    found = get_family("stable-diffusion")
    spec = found.decoder_spec(8, 4)
    assert spec.num_frames(5) == spec.num_latents(5) == 5 and spec.is_causal


@torch.no_grad()
def test_chunks_give_the_same_frames_and_tiles_are_refused(tmp_path: Path) -> None:
    decoder = saved(random_kl(kl_config("stable-diffusion")), tmp_path).require_decoder()
    latents = torch.randn(1, 4, 5, 4, 6)
    whole = decode(decoder, latents)
    for chunk in (1, 2):
        assert share_of_range(DecodeRuntime(decoder, DecodeSettings(chunk=chunk)).decode(latents), whole) < 1e-5
    with pytest.raises(SpecError, match="statistics of its GroupNorm over whole frames"):
        DecodeRuntime(decoder, DecodeSettings(tile=2)).decode(latents)
    limited = DecodeRuntime(decoder, DecodeSettings(max_memory_bytes=2**30)).plan(latents)
    assert limited.tile is None


# --- other layouts of the same weights ---------------------------------------------------------


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the oldest diffusers files call the layers of attention."""
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    return renamed


def single_file(found: Checkpoint) -> dict[str, Tensor]:
    coders = [(coder.state_dict(), coder.spec) for coder in (found.decoder, found.encoder) if coder]
    return to_program(coders, original_layout(found.family), found.require_statistics())


@torch.no_grad()
def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.family == second.family
    for one, other in ((first.decoder, second.decoder), (first.encoder, second.encoder)):
        assert one is not None and other is not None and one.spec == other.spec
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_old_names_of_attention(tmp_path: Path) -> None:
    found = saved(random_kl(kl_config("stable-diffusion", 32, 32)), tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(old_names(load_file(weights)), weights)
    assert_same(load_checkpoint(tmp_path / "vae", builtins={}), found)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "whole model"])
@pytest.mark.parametrize("name", VARIANTS)
def test_single_files_are_those_that_diffusers_converts(name: str, wrapped: bool, tmp_path: Path) -> None:
    """Names against diffusers' own converter; in a whole model beside a diffusion model and a text encoder."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    oracle = random_kl(kl_config(name, 32, 32))
    found = saved(oracle, tmp_path / "vae")
    tensors = single_file(found)
    assert tensors["decoder.mid.attn_1.q.weight"].shape == (128, 128, 1, 1)
    converted = convert_ldm_vae_checkpoint(dict(tensors), oracle.config)
    own = oracle.state_dict()
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[key].reshape(own[key].shape), own[key]) for key in own)
    if wrapped:
        tensors = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 4, 3, 3)
        tensors["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "single.safetensors")
    assert_same(load_checkpoint(tmp_path / "single.safetensors", builtins={}, family=name), found)


def test_a_trainers_file_with_its_loss(tmp_path: Path) -> None:
    found = saved(random_kl(kl_config("stable-diffusion", 32, 32)), tmp_path / "vae")
    tensors = {**single_file(found), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": tensors}, tmp_path / "vae.ckpt")
    assert_same(load_checkpoint(tmp_path / "vae.ckpt", builtins={}, family="stable-diffusion"), found)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    save_file(single_file(saved(random_kl(kl_config("sdxl", 32, 32)), tmp_path / "vae")), tmp_path / "bare.safetensors")
    with pytest.raises(
        ArtifactError, match=r"compute different things\. Choose one with --family stable-diffusion or --family sd"
    ):
        load_checkpoint(tmp_path / "bare.safetensors", builtins={})
    with pytest.raises(ArtifactError, match=r"latent_channels of flux\.1 is 16; the weights have 4"):
        load_checkpoint(tmp_path / "bare.safetensors", builtins={}, family="flux.1")
    with pytest.raises(ArtifactError, match="they fit sdxl"):
        load_checkpoint(tmp_path / "vae", builtins={}, family="stable-diffusion")


def test_a_configuration_without_factors_is_the_first_stable_diffusions(tmp_path: Path) -> None:
    saved(random_kl(kl_config("stable-diffusion")), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.18215,', ""))
    assert load_checkpoint(tmp_path, builtins={}).family == "stable-diffusion"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"norm_num_groups": 3},
            r"cannot part (8|32) channels into 3 equal groups, as norm_num_groups of a config\.json",
        ),
        ({"norm_num_groups": "many"}, "norm_num_groups is 'many'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is false; supported for stable-diffusion: true"),
        ({"use_quant_conv": False}, "use_quant_conv is false; the weights have true"),
        ({"block_out_channels": [8, 16, 32, 64]}, "supported for stable-diffusion: widths as 1 : 2 : 4 : 4"),
        ({"latent_channels": 16}, "latent_channels is 16; the weights have 4"),
    ],
)
def test_configurations_of_other_networks_are_refused(changed: dict, message: str, tmp_path: Path) -> None:
    import json

    saved(random_kl(kl_config("stable-diffusion")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path, builtins={})


def test_a_refusal_names_a_few_layers_and_counts_the_others(tmp_path: Path) -> None:
    import json

    saved(random_kl(kl_config("stable-diffusion")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_num_groups": 3}))
    with pytest.raises(ArtifactError, match=r"; and \d+ more\.$") as caught:
        load_checkpoint(tmp_path, builtins={})
    assert str(caught.value).count("cannot part") == 2


def test_statistics_by_channel_win_over_factors(tmp_path: Path) -> None:
    """As Playground 2.5 has them: pipelines undo raw = scaled * std / scaling_factor + mean."""
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    oracle = random_kl(kl_config("sdxl", scaling_factor=0.5, latents_mean=mean, latents_std=std))
    oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    for family in (None, "sdxl"):
        found = load_checkpoint(tmp_path, builtins={}, family=family)
        assert found.family == (family or "stable-diffusion")
        assert found.latent_mean == tuple(mean) and found.latent_std == (2.0, 4.0, 6.0, 8.0)


@pytest.mark.parametrize(
    ("release", "changed", "family"),
    [
        ("flux.1", {}, "flux.1"),
        ("flux.1", {"use_quant_conv": True, "use_post_quant_conv": True}, "flux.1"),
        ("sd3", {"scaling_factor": 1.0, "shift_factor": None}, "sd3"),
        ("sdxl", {"scaling_factor": 0.7}, "stable-diffusion"),
    ],
)
def test_factors_of_other_pipelines_are_read(release: str, changed: dict, family: str, tmp_path: Path) -> None:
    """One network: a configuration with factors of its own needs no --family."""
    config = kl_config(release, **changed)
    found = saved(random_kl(config), tmp_path)
    assert found.family == family
    scaling, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    assert found.latent_mean == (shift,) * found.latent_width
    assert found.latent_std == pytest.approx((1 / scaling,) * found.latent_width)
    assert family in str(succeed("info .", cwd=tmp_path))


def test_a_shift_without_a_scaling_factor_is_read(tmp_path: Path) -> None:
    saved(random_kl(kl_config("flux.1")), tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    del values["scaling_factor"]
    config.write_text(json.dumps({**values, "shift_factor": 0.5}))
    found = load_checkpoint(tmp_path, family="flux.1", builtins={})
    assert found.latent_mean == (0.5,) * 16 and found.latent_std == pytest.approx((1 / 0.3611,) * 16)


def test_the_class_of_every_variant_is_known() -> None:
    for name in VARIANTS:
        layout = class_layout(name)
        assert layout is not None and layout.config_class == "AutoencoderKL"


# --- what `export` writes, in diffusers' own loaders --------------------------------------------


@torch.no_grad()
def test_exports_load_in_diffusers(tmp_path: Path) -> None:
    """The original as diffusers' class, from a folder and from a single file; a pruned one as `AutoencoderFlash`."""
    oracle: Any = random_kl(kl_config("flux.1"))
    found = saved(oracle, tmp_path / "vae")
    spec = found.require_decoder().spec
    narrow = toy_decoder(narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3"))))
    save_checkpoint(tmp_path / "narrow.safetensors", derived_header(found), decoder=narrow)
    for name in ("vae", "narrow.safetensors"):
        succeed(f"export {name} -t diffusers -t safetensors --output out-{name}", cwd=tmp_path)
    latents, pixels = torch.randn(2, 16, 4, 6), torch.rand(1, 3, 16, 24)
    whole = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out-vae" / "diffusers")
    single = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "out-vae" / "vae.safetensors"), config=str(tmp_path / "out-vae" / "diffusers")
    )
    for model in (whole, single):
        assert (model.config.scaling_factor, model.config.shift_factor) == (0.3611, 0.1159)
        assert torch.equal(model.decode(latents).sample, oracle.decode(latents).sample)
        assert torch.equal(model.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    flash = diffusers.AutoModel.from_pretrained(
        str(tmp_path / "out-narrow.safetensors" / "diffusers"), trust_remote_code=True
    )
    assert flash.config["scaling_factor"] == 0.3611
    images = flash.decode(latents).sample
    assert share_of_range(images, decode(narrow, latents.unsqueeze(2)).squeeze(2)) < 1e-5
    assert torch.equal(flash.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    again = load_checkpoint(tmp_path / "out-narrow.safetensors" / "narrow.safetensors", builtins={})
    assert again.require_decoder().spec == narrow.spec and again.family == "flux.1"


def test_what_makes_no_sense_says_why(tmp_path: Path) -> None:
    saved(random_kl(kl_config("sdxl")), tmp_path / "vae")
    for words, why in (
        ("convert-ops vae --profile image", "decodes every frame by itself already"),
        ("convert-ops vae --time-rank 0.5", "no temporal upsampler"),
        ("convert-ops vae --operator up2=causal3d", "is frame2d: it converts to dwsep3d"),
        ("prune vae --layout native --ratio 0.5 --dry-run", "one block_out_channels and one norm_num_groups"),
        ("export vae -t comfyui", "no axis of time"),
    ):
        refused = invoke(words, cwd=tmp_path)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr
    torch.save(torch.randn(1, 4, 2, 4, 4), tmp_path / "latents.pt")
    refused = invoke("decode latents.pt -d vae -o video.mp4 --tile 2", cwd=tmp_path)
    assert refused.exit_code == 2 and "no tiles: head.0" in refused.stderr


@pytest.mark.parametrize("shape", ["tae", "efficientvit"])
def test_light_decoders_for_these_latents_have_no_groups_to_describe(shape: LightShape) -> None:
    """And so the original beside which they are exported has those of its release."""
    family = get_family("sdxl")
    original = family.decoder_spec(32, 4)
    light = light_spec(shape, original, 16)
    assert family.described(light) == {}
    assert original_like(light)(32, 4) == original
