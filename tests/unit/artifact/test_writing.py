"""Files for other programs hold latent statistics under their names, and are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.families.registry import FAMILIES, get_family, original_layout
from tests.ltx_toy import VERSIONS, flash_ltx_spec, ltx_decoder, ltx_spec
from tests.toy import toy_decoder

STATISTICS = ((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "leanvae"])  # see parity/test_leanvae
def test_written_files_are_read_back(family: str, tmp_path: Path) -> None:
    width = {"sd3": 16, "flux.1": 16, "flux.2": 32, "seedvr2": 16}.get(
        family, 4
    )  # with other latents they are other variants
    statistics = ((0.1,) * 128, (2.0,) * 128) if family == "flux.2" else STATISTICS  # of patches of 2 x 2 latents
    spec = get_family(family).decoder_spec(4, width)
    decoder = ltx_decoder(spec) if family in VERSIONS else toy_decoder(spec)
    tensors = to_program([(decoder.state_dict(), spec)], original_layout(family), statistics)
    zeros, ones = json.dumps([0] * width), json.dumps([1] * width)
    metadata = {"flashvaed.family": family, "latents_mean": zeros, "latents_std": ones}
    metadata["config"] = json.dumps(get_family(family).described(spec))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", metadata)
    found = load_checkpoint(tmp_path / "x.safetensors", builtins={})
    assert found.require_decoder().spec == spec
    for name, value in found.require_decoder().state_dict().items():
        torch.testing.assert_close(value, decoder.state_dict()[name], rtol=0, atol=2e-7)  # 1 + (gain - 1), in float32
    if family in VERSIONS:  # among the weights, which win over the metadata
        assert torch.equal(torch.tensor(found.latent_std), torch.tensor(STATISTICS[1]))
        assert torch.equal(tensors["vae.per_channel_statistics.mean-of-means"], torch.tensor(STATISTICS[0]))


@pytest.mark.parametrize("version", VERSIONS[1:3])
def test_a_condition_is_written_where_a_stage_has_one_width(version: str) -> None:
    whole = ltx_spec(version)
    block = whole.stage("up0").blocks[1]
    assert isinstance(block, ResBlockSpec)
    conv1, conv2 = block.conv1.model_copy(update={"out_width": 3}), block.conv2.model_copy(update={"in_width": 3})
    narrow = whole.with_blocks({"up0.1": block.model_copy(update={"conv1": conv1, "conv2": conv2})})
    for spec, is_table in ((whole, True), (flash_ltx_spec(version), True), (narrow, False)):
        tensors = to_program([(ltx_decoder(spec).state_dict(), spec)], original_layout(version), STATISTICS)
        assert ("vae.decoder.timestep_scale_multiplier" in tensors) == is_table
        assert ("vae.decoder.last_scale_shift_table" in tensors) == is_table
        assert ("vae.decoder.up_blocks.0.res_blocks.0.norm1.bias" in tensors) != is_table
        zeros = [value for name, value in tensors.items() if "time_embedder" in name]
        assert all(not value.any() for value in zeros)
