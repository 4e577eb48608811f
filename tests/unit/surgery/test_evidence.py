"""Evidence of a group: pooling by hand, weights by perturbing the real decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.groups import ChannelGroup, channel_groups
from flashvaed_cli.surgery.evidence import channel_evidence, pooled_evidence
from tests.toy import DECODER_SPECS, original_spec, toy_decoder
from tests.unit.surgery.random_statistics import random_statistics


def group_named(name: str, decoder: Decoder) -> ChannelGroup:
    return next(group for group in channel_groups(decoder.spec) if group.name == name)


def test_tensors_of_a_group_weigh_the_same() -> None:
    decoder, statistics = toy_decoder(), random_statistics(original_spec())
    group = group_named("up3.stream", decoder)
    pooled = pooled_evidence(group, statistics)
    quiet = statistics["up3.1"]
    louder = {**statistics, "up3.1": replace(quiet, covariance=1e6 * quiet.covariance, mean=1e3 * quiet.mean)}
    torch.testing.assert_close(pooled_evidence(group, louder).covariance, pooled.covariance)
    torch.testing.assert_close(pooled_evidence(group, louder).second_moment, pooled.second_moment)
    assert float(pooled.covariance.trace()) == pytest.approx(len(group.tensors))
    parts = [statistics[tensor] for tensor in group.tensors]
    expected = sum(torch.outer(one.mean, one.mean) / one.covariance.trace() for one in parts)
    assert pooled.second_moment is not None
    torch.testing.assert_close(pooled.second_moment - pooled.covariance, expected)


def relative_metric(layer: nn.Module, gain: Tensor, covariance: Tensor) -> Tensor:
    """M of a layer from what it makes of impulses in single channels, in units of its output's variance."""
    width = len(gain)
    impulses = torch.zeros(width + 1, width, 3, 5, 5)
    impulses[range(width), range(width), 0, 2, 2] = gain  # the first frame: causal taps all see it
    if isinstance(layer, nn.Linear):
        impulses = impulses.movedim(1, -1)
    outputs = layer(impulses).double().flatten(1)
    responses = outputs[:-1] - outputs[-1]  # the last is the bias alone
    metric = responses @ responses.T
    return metric / (metric * covariance).sum()


@pytest.mark.parametrize("name", ["original", "converted"])
@pytest.mark.parametrize(
    ("group_name", "consumers"),
    [
        ("mid.0.inner", [("mid.0.conv2", "mid.0.norm2")]),
        ("up1.entry", [("up1.0.conv1", "up1.0.norm1"), ("up1.0.shortcut", None)]),
        ("mid.stream", [("mid.0.conv1", "mid.0.norm1"), ("mid.1.qkv", "mid.1.norm"), ("mid.2.conv1", "mid.2.norm1"),
                        ("up0.0.conv1", "up0.0.norm1"), (None, None)]),
        ("up0.stream", [("up0.1.conv1", "up0.1.norm1"), ("up0.2.conv1", "up0.2.norm1"), ("up0.3.temporal", None),
                        ("up0.3.spatial", None)]),
        ("up3.stream", [("up3.0.conv1", "up3.0.norm1"), ("up3.1.conv1", "up3.1.norm1"),
                        ("up3.2.conv1", "up3.2.norm1"), ("head.0.conv", "head.0.norm")]),
    ],
)  # fmt: skip
def test_the_consumer_metric_is_what_impulses_do(
    name: str, group_name: str, consumers: list[tuple[str | None, str | None]]
) -> None:
    decoder = toy_decoder(DECODER_SPECS[name])
    group, statistics = group_named(group_name, decoder), random_statistics(decoder.spec)
    evidence = channel_evidence(decoder, group, statistics)
    expected = torch.zeros(group.width, group.width, dtype=torch.float64)
    for layer, norm in consumers:
        gain = torch.ones(group.width) if norm is None else decoder.at(norm).get_parameter("gamma")
        module = nn.Identity() if layer is None else decoder.at(layer)
        expected += relative_metric(module, gain, evidence.covariance)
    assert evidence.consumer_metric is not None
    # Impulses go through float32 convolutions.
    torch.testing.assert_close(evidence.consumer_metric, expected, rtol=1e-4, atol=1e-6)
    # Every consumer counts by the share of its output that is lost.
    assert float((evidence.consumer_metric * evidence.covariance).sum()) == pytest.approx(len(consumers))


def test_producer_weights_of_separable_layers_are_those_of_their_kernel() -> None:
    decoder = toy_decoder(DECODER_SPECS["converted"])
    group = group_named("mid.0.inner", decoder)
    layer = decoder.at("mid.0.conv1")
    impulses = torch.eye(16).reshape(16, 16, 1, 1, 1)
    kernel = F.conv3d(F.pad(impulses, (2, 2, 2, 2, 2, 2)), layer.get_parameter("depthwise"), groups=16)
    kernel = F.conv3d(kernel, layer.get_parameter("weight")[:, :, None, None, None])  # [C, O, taps]
    found = channel_evidence(decoder, group, random_statistics(decoder.spec)).producer_l1
    assert found is not None
    torch.testing.assert_close(found.float(), kernel.abs().sum(dim=(0, 2, 3, 4)))


def test_producer_weights_of_a_stream_are_added_up() -> None:
    decoder = toy_decoder()
    group = group_named("up1.stream", decoder)
    found = channel_evidence(decoder, group, random_statistics(decoder.spec)).producer_l1
    layers = ["up1.0.conv2", "up1.0.shortcut", "up1.1.conv2", "up1.2.conv2"]
    expected = sum(decoder.at(layer).get_parameter("weight").abs().flatten(1).sum(dim=1) for layer in layers)
    assert found is not None
    torch.testing.assert_close(found.float(), expected)


def test_a_consumer_of_zeros_does_not_count() -> None:
    decoder = toy_decoder()
    decoder.get_parameter("stages.up0.2.conv2.weight").zero_()
    evidence = channel_evidence(decoder, group_named("up0.2.inner", decoder), random_statistics(decoder.spec))
    assert evidence.consumer_metric is not None
    assert not bool(evidence.consumer_metric.any())
