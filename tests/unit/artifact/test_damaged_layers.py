"""Files of light decoders and of families whose tensors are converted: damage is reported, never ignored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.errors import ArtifactError
from tests.kl_toys import kl_config, random_kl
from tests.leanvae_toy import leanvae_arguments, leanvae_weights
from tests.ltx_configs import ltx_config, random_ltx
from tests.unit.artifact.test_taehv import tensors_of

Change = Callable[[dict[str, Tensor]], object]


def taesd_tensors(latent_width: int = 4, width: int = 4) -> dict[str, Tensor]:
    """One chain at each of four sizes, under the names in madebyollin's decoder files."""
    found: dict[str, Tensor] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = torch.randn(shape) * 0.1
        if bias:
            found[f"{name}.bias"] = torch.randn(shape[0]) * 0.1

    add("1", width, latent_width, 3, 3)
    for number in (3, 6, 9, 12):
        for layer in (0, 2, 4):
            add(f"{number}.conv.{layer}", width, width, 3, 3)
        if number < 12:
            add(f"{number + 2}", width, width, 3, 3, bias=False)
    add("13", 3, width, 3, 3)
    return found


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.__setitem__(name, torch.ones(shape, dtype=dtype))


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def save_or_skip(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors; older releases of safetensors write no complex numbers."""
    try:
        save_file(dict(tensors), path)
    except KeyError as error:
        pytest.skip(f"this release of safetensors writes no {error}")


def refused(path: Path, family: str, pattern: str) -> None:
    with pytest.raises(ArtifactError, match=pattern) as error:
        load_checkpoint(path, builtins={}, family=family)
    assert "pydantic" not in str(error.value) and "\n" not in str(error.value).split("layout.")[0]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without("5.weight"), r"scale by 1 x 4 x 4"),
        (without("1.bias"), r"a TAESD without 1\.bias"),
        (without("13.bias"), r"a TAESD without 13\.bias"),
        (without("9.conv.2.weight"), r"a TAESD without 9\.conv\.2\.weight"),
        (put("1.weight", 4, 4, 5, 5), r"1\.weight has the shape \[4, 4, 5, 5\], not \[any, any, 3, 3\]"),
        (put("1.weight", 4), r"1\.weight has the shape \[4\]"),
        (put("1.bias", 5), r"1\.bias has the shape \[5\], not \[4\]"),
        (put("6.conv.0.weight", 4, 4, 3, 3, dtype=torch.int8), r"6\.conv\.0\.weight is torch\.int8"),
        (put("6.conv.0.weight", 4, 4, 3, 3, dtype=torch.complex64), r"6\.conv\.0\.weight is torch\.complex64"),
        (put("13.weight", 12, 4, 3, 3), r"13\.weight has the shape \[12, 4, 3, 3\], not \[3, 4, 3, 3\]"),
        (put("3.skip.weight", 4, 4, 1, 1), r"no place for 3\.skip\.weight"),
        (put("foo", 1), r"no place for foo"),
        (put("99.weight", 3, 4, 3, 3), r"not a TAESD that this version reads: a stage without a block"),
        (put("1.weight", 0, 4, 3, 3), r"1\.weight has the shape \[0, 4, 3, 3\]"),
    ],
)
def test_a_damaged_taesd(change: Change, pattern: str, tmp_path: Path) -> None:
    tensors = taesd_tensors()
    save_file(tensors, tmp_path / "whole.safetensors")
    assert load_checkpoint(tmp_path / "whole.safetensors", builtins={}, family="sdxl").family == "sdxl"
    change(tensors)
    save_or_skip(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "sdxl", pattern)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("upsample_fn", "bilinear"),
        ("upsampling_scaling_factor", 3),
        ("latent_channels", 16),
        ("out_channels", 4),
        ("scaling_factor", 0.5),
        ("scaling_factor", "x"),
        ("scaling_factor", True),
        ("shift_factor", 0.1),
    ],
)
def test_a_configuration_of_another_tiny_decoder(key: str, value: object, tmp_path: Path) -> None:
    tensors = taesd_tensors()
    listed = {f"decoder.layers.{int(number) - 1}.{rest}": tensor for (number, rest), tensor in _split(tensors)}
    save_file(listed, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "latent_channels": 4, "scaling_factor": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path, builtins={}, family="sdxl").family == "sdxl"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    refused(tmp_path, "sdxl", f"{key} is .* in its configuration, not ")


def _split(tensors: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    return [(name.split(".", 1), tensor) for name, tensor in tensors.items()]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (put("decoder.1.weight", 8, 16, 5, 5), r"decoder\.1\.weight has the shape \[8, 16, 5, 5\]"),
        (put("decoder.1.weight"), r"decoder\.1\.weight has the shape \[\]"),
        (put("decoder.1.bias", 5), r"decoder\.1\.bias has the shape \[5\], not \[8\]"),
        (put("decoder.22.weight", 6, 4, 3, 3), r"decoder\.22"),
        (put("decoder.22.weight", 3), r"decoder\.22\.weight has the shape \[3\]"),
        (put("decoder.13.conv.weight", 6, 6, 1, 1), r"decoder\.13 makes 6 channels of 6, not 12"),
        (put("decoder.13.conv.weight", 12, 6, 3, 3), r"decoder\.13\.conv\.weight has the shape \[12, 6, 3, 3\]"),
        (put("decoder.3.conv.0.weight", 8, 16, 1, 1), r"decoder\.3\.conv\.0\.weight has the shape"),
        (put("decoder.8.weight", 6, 8, 5, 5), r"decoder\.8\.weight has the shape"),
        (put("decoder.8.bias", 6), r"no place for decoder\.8\.bias"),
        (put("decoder.3.skip.weight", 8, 8, 1, 1), r"no place for decoder\.3\.skip\.weight"),
        (put("decoder.4.conv.2.weight", 8, 8, 3, 3, dtype=torch.int32), r"is torch\.int32"),
    ],
)
def test_a_damaged_taehv(change: Change, pattern: str, tmp_path: Path) -> None:
    tensors = tensors_of(16, 1)
    change(tensors)
    torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "wan2.1", pattern)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without("decoder.fusion_layer.ffd_layer.0.0.bias"), r"missing: .*fusion.*norm"),
        (without("latent_bottleneck.forward_l.0.ffd_layer.0.0.bias"), r"missing: .*analysis.*norm"),
        (put("latent_bottleneck.phi", 3), "do not fit the leanvae-original layout"),
        (put("latent_bottleneck.weights.0", 3), r"latent_bottleneck\.weights\.0 has the shape \[3\]"),
        (put("std_layer.weight"), "do not fit the leanvae-original layout"),
    ],
)
def test_a_damaged_leanvae(change: Change, pattern: str, tmp_path: Path) -> None:
    tensors = leanvae_weights(4)
    change(tensors)
    torch.save(tensors, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "leanvae", pattern)


def test_a_contradiction_of_both_halves_is_told_once(tmp_path: Path) -> None:
    torch.save({"args": {**leanvae_arguments(4), "l_dim": 5}, "state_dict": leanvae_weights(4)}, tmp_path / "x.ckpt")
    with pytest.raises(ArtifactError) as error:
        load_checkpoint(tmp_path / "x.ckpt", builtins={})
    assert str(error.value).count("l_dim") == 1


def damaged_folder(folder: Path, change: Change) -> Path:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("end", ["weight", "bias"])
def test_a_group_norm_has_gain_and_shift(end: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy")
    random_kl(kl_config("sdxl")).save_pretrained(tmp_path)  # type: ignore[operator]
    name = f"decoder.conv_norm_out.{end}"
    refused(damaged_folder(tmp_path, without(name)), "sdxl", f"missing: {name}")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            without("decoder.mid_block.resnets.0.scale_shift_table"),
            r"no tensor named .*mid_block\.resnets\.0\.scale_sh",
        ),
        (without("decoder.scale_shift_table"), r"no tensor named decoder\.scale_shift_table"),
        (put("decoder.time_embedder.timestep_embedder.linear_1.bias", 1), r"linear_1 has the shapes"),
        (put("decoder.time_embedder.timestep_embedder.linear_1.weight", 2, 2, 2), r"linear_1 has the shapes"),
        (put("decoder.time_embedder.timestep_embedder.linear_2.bias"), r"linear_2 has the shapes"),
    ],
)
def test_a_damaged_condition_on_the_timestep(change: Change, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy")
    random_ltx(ltx_config("0.9.1", 4, 4)).save_pretrained(tmp_path)  # type: ignore[operator]
    refused(damaged_folder(tmp_path, change), "ltx", pattern)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("scaling_factor", 0, "scaling_factor is 0; latents are multiplied by a positive number"),
        ("scaling_factor", "x", "scaling_factor of config.json is 'x'; expected finite numbers"),
        ("shift_factor", "x", "shift_factor of config.json is 'x'; expected finite numbers"),
        ("block_out_channels", [], r"block_out_channels of config.json is \[\]; expected 4 widths"),
        ("block_out_channels", {}, r"block_out_channels of config.json is {}; expected 4 widths"),
    ],
)
def test_values_that_no_configuration_has(key: str, value: object, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy")
    random_kl(kl_config("sdxl")).save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    refused(tmp_path, "sdxl", pattern)


def test_a_variant_has_its_own_number_of_latent_channels(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy")
    random_kl(kl_config("sdxl")).save_pretrained(tmp_path)  # type: ignore[operator]
    refused(tmp_path, "sd3", "latent_channels of sd3 is 16; the weights have 4")
