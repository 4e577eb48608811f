"""The evidence for choosing channels of a group: statistics of its tensors, weights of the layers around it.

Reference: arXiv 2602.19161, section 3.1. Departure: the tensors of a group are weighted equally by scaling
each covariance to trace one, and one set is chosen for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.spec.groups import ChannelGroup, consumers, is_gated, producers
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.selection import ChannelEvidence


def pooled_evidence(group: ChannelGroup, statistics: Mapping[str, TensorStatistics]) -> ChannelEvidence:
    """Sum the tensors' covariances and second moments, each scaled so that its covariance has trace one.

    Raises:
        CalibrationError: a tensor has no statistics of the group's width, does not vary, or holds NaN.
    """
    covariance = torch.zeros(group.width, group.width, dtype=torch.float64)
    second_moment = torch.zeros_like(covariance)
    for tensor in group.tensors:
        found = statistics.get(tensor)
        if found is None or found.covariance.shape[0] != group.width:
            held = "none" if found is None else f"{found.covariance.shape[0]} channels"
            raise CalibrationError(
                f"{tensor}: the analysis holds {held}, the decoder has {group.width} channels; "
                "run `flashvaed analyze` on this very decoder"
            )
        if not bool(torch.isfinite(found.covariance).all() & torch.isfinite(found.mean).all()):
            raise CalibrationError(
                f"{tensor}: its statistics hold NaN or infinite values; run `flashvaed analyze` again on valid clips"
            )
        trace = float(found.covariance.trace())
        if not trace > 0:
            raise CalibrationError(f"{tensor}: no channel varies over the calibration clips; use other clips")
        covariance += found.covariance.cpu() / trace
        mean = found.mean.cpu()
        second_moment += (found.covariance.cpu() + torch.outer(mean, mean)) / trace
    return ChannelEvidence(covariance, second_moment)


@torch.no_grad()
def channel_evidence(
    decoder: Coder, group: ChannelGroup, statistics: Mapping[str, TensorStatistics]
) -> ChannelEvidence:
    """Everything that a selection rule may use about a group.

    Raises:
        CalibrationError: the statistics do not fit the group.
    """
    pooled = pooled_evidence(group, statistics)
    return replace(
        pooled,
        run=group.run,
        producer_l1=_producer_l1(decoder, group),
        consumer_metric=_consumer_metric(decoder, group, pooled.covariance),
    )


def _producer_l1(decoder: Coder, group: ChannelGroup) -> Float64[Tensor, " C"]:
    """Sum of the absolute weights that produce each channel, over all layers that write to the group."""
    kernels = [_kernel(decoder, address) for address in producers(decoder.spec, group)]
    rows = [kernel.abs().flatten(1).sum(dim=1) for kernel in kernels]
    if is_gated(decoder.spec, group.tensors[0]):  # all values, then all gates
        return torch.stack([row.reshape(-1, group.width).sum(dim=0) for row in rows]).sum(dim=0)
    # A bypass has several rows per channel, one after another.
    return torch.stack([row.reshape(group.width, -1).sum(dim=1) for row in rows]).sum(dim=0)


def _consumer_metric(decoder: Coder, group: ChannelGroup, covariance: Float64[Tensor, "C C"]) -> Float64[Tensor, "C C"]:
    """Sum over the consumers of VᵀV summed over the taps, each in units of its own output's variance.

    So every consumer counts by the share of its output that is lost, with or without a norm before it.
    Linearised: a norm is its gamma, SiLU is left out, and neighbouring taps count as uncorrelated.
    """
    total = torch.zeros_like(covariance)
    for consumer in consumers(decoder.spec, group):
        metric = torch.eye(group.width, dtype=torch.float64)
        if consumer.layer is not None:
            kernel = _kernel(decoder, consumer.layer)  # [O, C, taps]
            if consumer.norm is not None:
                gamma = decoder.at(consumer.norm).gamma
                if isinstance(gamma, Tensor):  # some norms have no gain
                    kernel = kernel * gamma.cpu().double()[:, None]
            rows = kernel.transpose(1, 2).flatten(0, 1)  # [O * taps, C]
            metric = rows.T @ rows
        energy = float((metric * covariance).sum())  # tr(M S)
        if energy > 0:  # a layer of zeros depends on nothing
            total += metric / energy
    return total


def _kernel(decoder: Coder, address: str) -> Float64[Tensor, "O C taps"]:
    """The dense weights of a layer, whatever its operator."""
    layer = decoder.at(address)
    if isinstance(layer, Conv):
        return layer.dense_kernel().cpu().double().flatten(2)
    return layer.get_parameter("weight").cpu().double()[:, :, None]  # an attention's projection
