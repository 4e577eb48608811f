"""Our LTX-Video and LTX-2 against diffusers' models: same random weights, float32, same numbers.

The bound of 1e-4 of the output's range leaves room for float32 sums in another order (below 3e-6 is measured).
Conditioned versions are compared at one timestep, which ours has folded into its norms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.coders import coders_from_foreign
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.artifact.foreign.recognition import recognise
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.ltx.config import configured
from flashvaed_cli.families.ltx.spec import DECODE_TIMESTEP
from flashvaed_cli.families.registry import LAYOUTS, get_family
from tests.injected_noise import injected_noise
from tests.ltx_configs import FAMILIES, VERSIONS, ltx_config, random_ltx
from tests.parity.oracles import share_of_range

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

BASE_WIDTH, LATENT_WIDTH = 8, 8
RANGE_BOUND = 1e-4


@dataclass
class Pair:
    """The oracle and ours, with the same weights."""

    oracle: nn.Module
    decoder: Decoder
    encoder: Encoder

    def decoded(self, latents: Tensor, timestep: float = DECODE_TIMESTEP) -> Tensor:
        """The oracle's frames, without its noise."""
        is_conditioned = self.oracle.config.timestep_conditioning  # type: ignore[union-attr]
        temb = torch.full((latents.shape[0],), timestep) if is_conditioned else None
        scales = [p for name, p in self.oracle.named_parameters() if "per_channel_scale" in name]
        kept = [scale.clone() for scale in scales]
        try:
            for scale in scales:
                scale.zero_()
            return self.oracle.decode(latents, temb).sample  # type: ignore[operator]
        finally:
            for scale, value in zip(scales, kept, strict=True):
                scale.copy_(value)


def pair_of(oracle: nn.Module, **config: Any) -> Pair:
    tensors = dict(oracle.state_dict())
    layout = recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    coders = coders_from_foreign(tensors, layout, config={**oracle.config, **config})  # type: ignore[dict-item]
    decoder, encoder = coders["decoder"], coders["encoder"]
    assert isinstance(decoder, Decoder) and isinstance(encoder, Encoder)
    return Pair(oracle, decoder, encoder)


def small_pair(version: str, *, causal: bool = False) -> Pair:
    return pair_of(random_ltx(ltx_config(version, BASE_WIDTH, LATENT_WIDTH, decoder_causal=causal)))


@torch.no_grad()
def assert_parity(pair: Pair, num_frames: int, height: int, width: int) -> None:
    pixels = torch.rand(1, 3, num_frames, height, width) * 2 - 1
    expected_latents = pair.oracle.encode(pixels).latent_dist.mode()  # type: ignore[operator]
    latents = encode(pair.encoder, pixels)
    expected_frames, frames = pair.decoded(expected_latents), pair.decoder(expected_latents)
    assert frames.shape[2] == num_frames
    errors = share_of_range(latents, expected_latents), share_of_range(frames, expected_frames)
    print(f"{num_frames} frames: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    assert max(errors) <= RANGE_BOUND


@pytest.mark.parametrize("causal", [False, True], ids=["centred", "causal"])
@pytest.mark.parametrize("version", VERSIONS)
def test_small(version: str, causal: bool) -> None:
    pair = small_pair(version, causal=causal)
    assert pair.decoder.spec.is_causal == causal
    for num_frames, height in ((1, 96), (17, 64)):
        assert_parity(pair, num_frames, height, 64)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_encoder_that_sees_frames_ahead(version: str) -> None:
    pair = pair_of(random_ltx(ltx_config(version, BASE_WIDTH, LATENT_WIDTH, encoder_causal=False)))
    assert not pair.encoder.spec.is_causal
    assert_parity(pair, 17, 64, 96)


def test_an_encoder_that_mirrors_frames() -> None:
    config = ltx_config("2", BASE_WIDTH, LATENT_WIDTH, encoder_spatial_padding_mode="reflect")
    assert_parity(pair_of(random_ltx(config)), 9, 64, 96)


@pytest.mark.parametrize("latent_width", [4, 16])
def test_the_encoder_of_ltx_2_begins_with_the_latent_width(latent_width: int, tmp_path: Path) -> None:
    oracle = random_ltx(ltx_config("2", BASE_WIDTH, latent_width))
    oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    found = load_checkpoint(tmp_path, builtins={})
    encoder, decoder = found.require_encoder(), found.require_decoder()
    assert next(layer.out_width for _, layer in encoder.spec.layers()) == latent_width
    assert_parity(Pair(oracle, decoder, encoder), 9, 64, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 64, 128, 256]}))
    expected = rf"\[32, 64, 128, 256\], so {latent_width} -> 32 channels in encoder down0"
    with pytest.raises(ArtifactError, match=expected):
        load_checkpoint(tmp_path, builtins={})


@pytest.mark.bench
@pytest.mark.parametrize("version", VERSIONS)
def test_full_size(version: str) -> None:
    pair = pair_of(random_ltx(ltx_config(version, 128)))
    family = get_family(FAMILIES[version])
    assert pair.decoder.spec == configured(family.decoder_spec(128, 128), pair.oracle.config)  # type: ignore[arg-type]
    assert pair.encoder.spec == family.encoder_spec(128, 128)
    for num_frames in (1, 9):
        assert_parity(pair, num_frames, 64, 64)


@pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
def test_another_timestep(version: str) -> None:
    pair = pair_of(random_ltx(ltx_config(version, BASE_WIDTH, LATENT_WIDTH)), decode_timestep=0.3)
    assert pair.decoder.spec.decode_timestep == 0.3
    latents = torch.randn(1, LATENT_WIDTH, 2, 2, 3)
    with torch.no_grad():
        frames = pair.decoder(latents)
        assert share_of_range(frames, pair.decoded(latents, 0.3)) <= RANGE_BOUND
        assert share_of_range(frames, pair.decoded(latents)) > 10 * RANGE_BOUND


@torch.no_grad()
def test_noise_is_the_oracles_under_the_same_seed() -> None:
    pair = small_pair("0.9.1")
    latents = torch.randn(1, LATENT_WIDTH, 2, 2, 3)
    torch.manual_seed(7)
    expected = pair.oracle.decode(latents, torch.tensor([DECODE_TIMESTEP])).sample  # type: ignore[operator]
    with injected_noise(pair.decoder, seed=7):
        noisy = pair.decoder(latents)
    assert share_of_range(noisy, expected) <= RANGE_BOUND
    assert share_of_range(pair.decoder(latents), expected) > 10 * RANGE_BOUND


@torch.no_grad()
def test_residual_and_factor_are_the_configurations() -> None:
    config = ltx_config("0.9.5", BASE_WIDTH, LATENT_WIDTH, upsample_residual=(True, False, False))
    pair = pair_of(random_ltx(config))
    assert_parity(pair, 9, 32, 64)


def test_no_key_is_left_over() -> None:
    for version in VERSIONS:
        pair = small_pair(version)
        layout = LAYOUTS[f"ltx-{version}-diffusers"]
        ours = {s for c in (pair.decoder, pair.encoder) for s in to_foreign(c.state_dict(), c.spec, layout)}
        theirs = {name for name in pair.oracle.state_dict() if "latents_" not in name}
        folded = {name for name in theirs if "time_embedder" in name or "scale_shift" in name or "multiplier" in name}
        gains = {name for name in ours if ".norm1." in name or ".norm2." in name or "decoder.norm_out." in name}
        assert ours - gains == theirs - folded
        assert bool(gains) == bool(folded) == (version in ("0.9.1", "0.9.5"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_folder_loads(version: str, tmp_path: Path) -> None:
    pair = small_pair(version, causal=True)
    pair.oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    checkpoint = load_checkpoint(tmp_path / "vae", builtins={})
    assert (checkpoint.layout, checkpoint.family) == (f"ltx-{version}-diffusers", FAMILIES[version])
    assert checkpoint.latent_mean == tuple(pair.oracle.latents_mean.tolist())  # type: ignore[union-attr, operator]
    assert checkpoint.latent_std == tuple(pair.oracle.latents_std.tolist())  # type: ignore[union-attr, operator]
    assert checkpoint.decoder is not None and checkpoint.decoder.spec == pair.decoder.spec
    for role in ("decoder", "encoder"):
        for name, value in getattr(pair, role).state_dict().items():
            assert torch.equal(getattr(checkpoint, role).state_dict()[name], value)


def original_file(pair: Pair, version: str, path: Path, *, with_transformer: bool) -> dict[str, Tensor]:
    """LTX's own single file, by undoing what diffusers' converter does to names."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    layout = LAYOUTS[f"ltx-{version}-original"]
    plain: dict[str, Tensor] = {}
    for coder in (pair.decoder, pair.encoder):
        plain |= to_foreign(coder.state_dict(), coder.spec, layout)
    marks = _marked(plain, version)
    places = {id(mark): name.removeprefix("vae.") for name, mark in marks.items()}
    is_second = version.startswith("2")
    convert = utils.convert_ltx2_vae_to_diffusers if is_second else utils.convert_ltx_vae_checkpoint_to_diffusers
    converted = convert(dict(marks))
    if version == "2.3":  # the converter stops at LTX-2's six entries
        last = {"up_blocks.7": "up_blocks.3.upsamplers.0", "up_blocks.8": "up_blocks.3"}
        converted = {_replaced(name.replace("res_blocks", "resnets"), last): mark for name, mark in converted.items()}
    names = {theirs: places[id(mark)] for theirs, mark in converted.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in pair.oracle.state_dict().items():
        tensors[f"vae.{names.get(name) or _conditioning_name(name, version)}"] = tensor
    if with_transformer:
        tensors["model.diffusion_model.patchify_proj.weight"] = torch.zeros(2, 2)
    if is_second:
        tensors["audio_vae.per_channel_statistics.mean-of-means"] = torch.zeros(2)
    config = {"vae": {"causal_decoder": pair.decoder.spec.is_causal}, "transformer": {}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"config": json.dumps(config)})
    return tensors


def _replaced(name: str, entries: dict[str, str]) -> str:
    for ours, theirs in entries.items():
        name = name.replace(f"decoder.{ours}.", f"decoder.{theirs}.")
    return name


def _marked(names: Iterable[str], version: str) -> dict[str, Tensor]:
    """Something else for every name, with what the converter tells the versions by."""
    columns = 2048 if version == "0.9.5" else 1
    marks = {f"vae.{name}": torch.zeros(1, columns) for name in names}
    if version == "0.9.1":
        marks["vae.decoder.last_time_embedder.timestep_embedder.linear_1.weight"] = torch.zeros(1)
    return marks


def _conditioning_name(name: str, version: str) -> str:
    """Names that ours has no tensor for: the embedding of the timestep and the statistics."""
    if name.startswith("latents_"):
        return f"per_channel_statistics.{name.removeprefix('latents_')}-of-means"
    name = name.replace("decoder.scale_shift_table", "decoder.last_scale_shift_table")
    name = name.replace("decoder.time_embedder", "decoder.last_time_embedder")
    stage = {"mid_block": 0, "up_blocks.0": 2, "up_blocks.1": 4, "up_blocks.2": 6}
    for theirs, entry in stage.items():
        if name.startswith(f"decoder.{theirs}."):
            name = name.replace(f"decoder.{theirs}.", f"decoder.up_blocks.{entry}.", 1)
            break
    return name.replace(".resnets.", ".res_blocks.")


@pytest.mark.parametrize(("version", "with_transformer"), [(version, version != "0.9.1") for version in VERSIONS])
def test_the_single_file_loads(version: str, with_transformer: bool, tmp_path: Path) -> None:
    pair = small_pair(version, causal=True)
    path = tmp_path / "ltx.safetensors"
    original_file(pair, version, path, with_transformer=with_transformer)
    checkpoint = load_checkpoint(path, builtins={})
    assert (checkpoint.layout, checkpoint.family) == (f"ltx-{version}-original", FAMILIES[version])
    assert checkpoint.decoder is not None and checkpoint.decoder.spec == pair.decoder.spec
    assert checkpoint.latent_mean == tuple(pair.oracle.latents_mean.tolist())  # type: ignore[union-attr, operator]
    for role in ("decoder", "encoder"):
        for name, value in getattr(pair, role).state_dict().items():
            assert torch.equal(getattr(checkpoint, role).state_dict()[name], value)
