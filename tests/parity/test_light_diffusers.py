"""Light decoders against diffusers: `AutoencoderTiny` (TAESD, TAE-192) and `AutoencoderDC` (the "EfficientViT" one).

Same random weights, float32. The family is Wan 2.1 made for single images, with 4 latent channels: its grid counts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import RANGE_BOUND, share_of_range
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import ChainSpec
from flashvaed_cli.decoders.spec.light import LightShape, light_spec
from flashvaed_cli.decoders.variants.still import still_spec
from flashvaed_cli.families.wan21.spec import wan_decoder_spec

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

LATENT_WIDTH = 4


def image_decoder(shape: LightShape, width: int) -> Decoder:
    decoder = Decoder(light_spec(shape, still_spec(wan_decoder_spec(8, LATENT_WIDTH)), width))
    return decoder.eval().requires_grad_(False)


@torch.no_grad()
def randomised(oracle: nn.Module) -> nn.Module:
    """Weights that keep activations of order one; biases, norms and running statistics differ from their defaults."""
    oracle.eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=(1.5 / parameter[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        else:
            parameter.uniform_(0.2, 0.5)
    for name, buffer in oracle.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return oracle


def put(decoder: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """Fill the decoder; biases that the oracle lacks are zero."""
    zeros = {name: torch.zeros_like(value) for name, value in decoder.state_dict().items() if name.endswith("bias")}
    decoder.load_state_dict({**zeros, **tensors})
    return decoder


def tae_weights(decoder: Decoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From a `Sequential` of convolutions and blocks; its frames in [0, 1] become [-1, 1] in the head."""
    slots = iter(sorted({int(name.split(".")[2]) for name in state if name.startswith("decoder.layers.")}))
    found: dict[str, Tensor] = {}
    for address, block in decoder.spec.blocks():
        place = f"decoder.layers.{next(slots)}"
        ours = {f"conv{i + 1}": f"{place}.conv.{2 * i}" for i in range(3)}
        if not isinstance(block, ChainSpec):
            ours = {next(reversed(block.layers)): place}
        for layer, theirs in ours.items():
            for key in ("weight", "bias"):
                if f"{theirs}.{key}" in state:
                    found[f"stages.{address}.{layer}.{key}"] = state[f"{theirs}.{key}"]
    found["stages.head.0.conv.weight"] = 2 * found["stages.head.0.conv.weight"]
    found["stages.head.0.conv.bias"] = 2 * found["stages.head.0.conv.bias"] - 1
    return found


@pytest.mark.parametrize("width", [16, pytest.param(192, marks=pytest.mark.bench)])
@torch.no_grad()
def test_tae(width: int) -> None:
    torch.manual_seed(0)
    config: dict[str, Any] = {"decoder_block_out_channels": (width,) * 4, "num_decoder_blocks": (3, 3, 3, 1)}
    oracle = randomised(diffusers.AutoencoderTiny(**config))
    decoder = image_decoder("tae", width)
    put(decoder, tae_weights(decoder, oracle.state_dict()))
    latents = 3 * torch.randn(2, LATENT_WIDTH, 5, 7)
    expected = oracle.decode(latents).sample  # type: ignore[operator]
    found = decoder(latents[:, :, None])[:, :, 0]
    error = share_of_range(found, expected)
    print(f"width {width}: {error:.1e} of the range")
    assert error <= RANGE_BOUND


def folded(state: dict[str, Tensor], place: str) -> tuple[Tensor, Tensor]:
    """A convolution without bias and the batch norm after it, as one convolution."""
    norm = {key: state[f"{place}.norm.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    gain = norm["weight"] * torch.rsqrt(norm["running_var"] + 1e-5)
    weight = state[f"{place}.conv2.weight"] * gain[:, None, None, None]
    return weight, norm["bias"] - gain * norm["running_mean"]


def dc_weights(decoder: Decoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From DC-AE's decoder; its last pixel shuffle has rows before columns, our patches columns before rows."""
    found = {"stages.post_quant.0.conv.weight": torch.eye(LATENT_WIDTH)}

    def conv(ours: str, theirs: str) -> None:
        for key in ("weight", "bias"):
            found[f"stages.{ours}.{key}"] = state[f"decoder.{theirs}.{key}"]

    conv("conv_in.0.conv", "conv_in")
    for stage, place in ((1, 2), (2, 1)):
        conv(f"shuffle{stage}.0.conv", f"up_blocks.{place}.0.conv")
        for index in range(len(decoder.spec.stage(f"up{stage}").blocks)):
            theirs, ours = f"up_blocks.{place}.{index + 1}", f"up{stage}.{index}"
            conv(f"{ours}.conv1", f"{theirs}.conv1")
            weight, bias = folded(state, f"decoder.{theirs}")
            found |= {f"stages.{ours}.conv2.weight": weight, f"stages.{ours}.conv2.bias": bias}
    found["stages.head.0.norm.gamma"] = state["decoder.norm_out.weight"]
    found["stages.head.0.norm.beta"] = state["decoder.norm_out.bias"]
    order = [c * 4 + i * 2 + j for c in range(3) for j in range(2) for i in range(2)]
    for key in ("weight", "bias"):
        found[f"stages.head.0.conv.{key}"] = state[f"decoder.conv_out.conv.{key}"][order]
    return found


@pytest.mark.parametrize("width", [8, pytest.param(128, marks=pytest.mark.bench)])
@torch.no_grad()
def test_efficientvit(width: int) -> None:
    torch.manual_seed(0)
    widths = (width,) * 3 + (2 * width,) * 3
    sides: dict[str, Any] = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("block_out_channels", widths), ("block_types", "ResBlock"))
    }
    oracle = diffusers.AutoencoderDC(
        **sides,
        latent_channels=LATENT_WIDTH,
        encoder_layers_per_block=(0, 1, 1, 0, 0, 0),
        decoder_layers_per_block=(0, 5, 10, 0, 0, 0),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types="batch_norm",
        decoder_act_fns="relu",
        upsample_block_type="pixel_shuffle",
    )
    decoder = image_decoder("efficientvit", width)
    put(decoder, dc_weights(decoder, randomised(oracle).state_dict()))
    latents = torch.randn(2, LATENT_WIDTH, 5, 7)
    error = share_of_range(decode(decoder, latents[:, :, None])[:, :, 0], oracle.decode(latents).sample.clamp(-1, 1))
    print(f"width {width}: {error:.1e} of the range")
    assert error <= RANGE_BOUND
