from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import Attention, ResBlock, Upsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.operators import LowRankConv3d, Pointwise, SeparableConv3d
from flashvaed_cli.errors import SpecError
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec, with_time_rank
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import DECODER_SPECS, kept_of, original_spec, toy_decoder, toy_latents


def pruned(reference: Decoder, *stages: str) -> Decoder:
    kept = kept_of(reference.spec, stages)
    return transfer_weights(reference, narrowed_spec(reference.spec, kept), kept)


@pytest.mark.parametrize("name", DECODER_SPECS)
def test_keeping_all_copies_every_weight(name: str) -> None:
    reference = toy_decoder(DECODER_SPECS[name])
    student = transfer_weights(reference, reference.spec, {})
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in student.state_dict().items())
    assert not student.training and not any(p.requires_grad for p in student.parameters())


def test_the_reference_is_not_touched() -> None:
    reference = toy_decoder()
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    student = pruned(reference, "up2", "up3")
    for parameter in student.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_weights_are_cut_to_the_kept_channels() -> None:
    reference = toy_decoder()
    student = pruned(reference, "up2")
    old, new = reference.at("up2.1"), student.at("up2.1")
    assert isinstance(old, ResBlock) and isinstance(new, ResBlock)
    left = torch.tensor([0, 2, 3, 4, 6, 7])
    assert torch.equal(new.conv1.weight, old.conv1.weight[left][:, left])
    assert torch.equal(new.conv1.bias, old.conv1.bias[left])
    assert torch.equal(new.norm2.get_parameter("gamma"), old.norm2.get_parameter("gamma")[left])
    assert isinstance(new.shortcut, Pointwise)
    assert torch.equal(new.shortcut.weight, torch.eye(6)) and not bool(new.shortcut.bias.any())


def test_temporal_upsampler_is_cut_in_both_halves() -> None:
    reference = toy_decoder()
    student = pruned(reference, "up0")
    old, new = reference.at("up0.3"), student.at("up0.3")
    assert isinstance(old, Upsample) and old.temporal is not None
    assert isinstance(new, Upsample) and new.temporal is not None
    left = torch.tensor([i for i in range(16) if i % 4 != 1])
    assert torch.equal(new.temporal.weight[:12], old.temporal.weight[left][:, left])
    assert torch.equal(new.temporal.weight[12:], old.temporal.weight[16 + left][:, left])


def test_a_low_rank_upsampler_keeps_the_cut_of_its_factors() -> None:
    reference = toy_decoder(with_time_rank(original_spec(), 0.25))
    student = pruned(reference, "up0")
    old, new = reference.at("up0.3"), student.at("up0.3")
    assert isinstance(old, Upsample) and isinstance(old.temporal, LowRankConv3d)
    assert isinstance(new, Upsample) and isinstance(new.temporal, LowRankConv3d)
    assert new.temporal.spec.rank == old.temporal.spec.rank
    left = torch.tensor([i for i in range(16) if i % 4 != 1])
    cut = old.temporal.dense_kernel()[torch.cat([left, 16 + left])][:, left]
    torch.testing.assert_close(new.temporal.dense_kernel(), cut, rtol=0, atol=1e-6)  # float32, another blocking


def test_attention_keeps_its_heads() -> None:
    reference = toy_decoder()
    student = pruned(reference, "mid")
    old, new = reference.at("mid.1"), student.at("mid.1")
    assert isinstance(old, Attention) and isinstance(new, Attention)
    left = torch.tensor([i for i in range(16) if i % 4 != 1])
    assert torch.equal(new.qkv.weight, old.qkv.weight[:, left]) and torch.equal(new.qkv.bias, old.qkv.bias)
    assert torch.equal(new.proj.weight, old.proj.weight[left])


@torch.no_grad()
def silence(decoder: Decoder, tensor: str, channels: list[int]) -> None:
    """Make channels of a tensor zero, and nothing after it read them."""
    layer = decoder.at(tensor)
    layer.weight[channels] = 0.0  # pyright: ignore[reportIndexIssue]
    layer.bias[channels] = 0.0  # pyright: ignore[reportIndexIssue]


def test_pruning_silent_insides_changes_nothing_but_the_norm() -> None:
    """Zero channels drop out of conv2; the norm over 6 of 8 channels differs by the root of 8/6 alone."""
    reference = toy_decoder()
    kept = {"up2.1.conv1": (0, 2, 3, 4, 6, 7)}
    silence(reference, "up2.1.conv1", [1, 5])
    student = transfer_weights(reference, narrowed_spec(reference.spec, kept), kept)
    norm = student.at("up2.1.norm2")
    norm.gamma.mul_((8 / 6) ** 0.5)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    latents = toy_latents()
    torch.testing.assert_close(student(latents), reference(latents), rtol=0, atol=1e-5)  # float32 rounding


def test_frame2d_from_only_the_last_tap_is_exact() -> None:
    reference = toy_decoder()
    for name, parameter in reference.named_parameters():
        if name.startswith("stages.up3.") and parameter.ndim == 5:
            parameter[:, :, :-1] = 0.0
    student = transfer_weights(reference, converted_spec(reference.spec, {"up3": "frame2d"}), {})
    latents = toy_latents()
    torch.testing.assert_close(student(latents), reference(latents), rtol=0, atol=1e-5)  # float32 rounding


def compose_separable_(decoder: Decoder, stage: str, seed: int = 1) -> None:
    """Give the dense 3D kernels of a stage rank one per input channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if name.startswith(f"stages.{stage}.") and weight.ndim == 5 and weight.shape[-1] == 3:
            depthwise = torch.randn(weight.shape[1:], generator=generator)
            pointwise = weight[:, :, 0, 0, 0].clone()
            weight.copy_(torch.einsum("oc,cthw->octhw", pointwise, depthwise))


def test_separable_kernels_are_found() -> None:
    reference = toy_decoder()
    compose_separable_(reference, "mid")
    student = transfer_weights(reference, converted_spec(reference.spec, {"mid": "dwsep3d"}), {})
    assert isinstance(student.at("mid.0.conv1"), SeparableConv3d)
    latents = toy_latents()
    torch.testing.assert_close(student(latents), reference(latents), rtol=0, atol=1e-4)  # SVD, float32 rounding


def test_a_dense_kernel_takes_over_a_separable_one() -> None:
    reference = toy_decoder(converted_spec(original_spec(), {"up3": "dwsep3d"}))
    student = transfer_weights(reference, original_spec(), {})
    latents = toy_latents()
    torch.testing.assert_close(student(latents), reference(latents), rtol=0, atol=1e-5)  # float32 rounding


def test_weights_do_not_come_from_nowhere() -> None:
    with pytest.raises(SpecError, match=r"up3\.0\.conv1: causal3d weights cannot come from frame2d ones"):
        transfer_weights(toy_decoder(converted_spec(original_spec(), {"up3": "frame2d"})), original_spec(), {})


def frames_of(decoder: Decoder, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder(latents)


@pytest.mark.parametrize("stages", [("mid",), ("up0", "up1"), ("up2", "up3"), ("mid", "up0", "up1", "up2", "up3")])
def test_pruned_decoders_run(stages: tuple[str, ...]) -> None:
    frames = frames_of(pruned(toy_decoder(), *stages), toy_latents(2))
    assert frames.shape == (1, 3, 5, 16, 24)
    assert bool(torch.isfinite(frames).all())


def test_pruning_twice_is_pruning_by_the_composition() -> None:
    reference = toy_decoder()
    once = pruned(reference, "up2")
    inner = {"up2.1.conv1": (1, 3)}
    twice = transfer_weights(once, narrowed_spec(once.spec, inner), inner)
    composed = {**kept_of(reference.spec, ("up2",)), "up2.1.conv1": (2, 4)}
    direct = transfer_weights(reference, twice.spec, composed)
    expected = direct.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twice.state_dict().items())
