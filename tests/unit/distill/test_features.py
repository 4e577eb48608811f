from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.features import FeatureMatcher, run_with_features
from flashvaed_cli.distill.phases import FeatureMatch
from tests.unit.distill.small_decoders import batches, teacher_decoder


def test_the_frames_are_the_decoders_own_and_the_tensors_are_where_they_belong() -> None:
    decoder, (latents,) = teacher_decoder(), batches(0)
    with torch.no_grad():
        frames, features = run_with_features(decoder, latents, ["up2.0", "up2.0.conv1"])
        before, _ = run_with_features(decoder, latents, ["up0.1"])
        assert torch.equal(frames, decoder(latents))
        block = decoder.at("up2.0")
        stream = run_with_features(decoder, latents, ["up0.1"])[1]["up0.1"]
        assert torch.equal(features["up2.0"], block(stream))
        assert torch.equal(features["up2.0.conv1"], block.conv1(torch.nn.functional.silu(block.norm1(stream))))  # type: ignore[operator]
    assert set(features) == {"up2.0", "up2.0.conv1"}
    assert torch.equal(before, frames)


def test_no_hook_stays_behind() -> None:
    decoder = teacher_decoder()
    run_with_features(decoder, batches(0)[0], ["up3.0.conv2"])
    assert not any(module._forward_hooks for module in decoder.modules())


def test_matching_by_index_compares_with_the_kept_channels() -> None:
    teacher = torch.randn(1, 4, 1, 2, 2)
    matcher = FeatureMatcher([FeatureMatch("a.0", kept=(3, 1))])
    assert float(matcher({"a.0": teacher[:, [3, 1]]}, {"a.0": teacher})) == 0
    assert float(matcher({"a.0": teacher[:, [1, 3]]}, {"a.0": teacher})) > 0


def test_a_projection_starts_at_the_given_map_and_trains() -> None:
    student = torch.randn(1, 2, 1, 3, 3)
    weight, bias = torch.randn(4, 2), torch.randn(4)
    teacher = torch.einsum("ck,bkthw->bcthw", weight, student) + bias.view(1, 4, 1, 1, 1)
    matcher = FeatureMatcher([FeatureMatch("a.0", projection=(weight, bias)), FeatureMatch("b.0")])
    distance = matcher({"a.0": student, "b.0": student}, {"a.0": teacher, "b.0": student + 1})
    assert torch.isclose(distance, torch.tensor(0.5), atol=1e-6)  # the mean of 0 and 1
    assert len(list(matcher.parameters())) == 2
    assert weight.grad is None and not weight.requires_grad


def test_collecting_works_inside_a_training_graph() -> None:
    decoder: Decoder = teacher_decoder()
    _, features = run_with_features(decoder, batches(0)[0], ["mid.0"])
    features["mid.0"].sum().backward()
    assert decoder.at("conv_in.0").conv.weight.grad is not None  # type: ignore[union-attr]
    assert decoder.at("up0.0").conv1.weight.grad is None  # type: ignore[union-attr]
