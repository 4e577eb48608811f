"""Covariances of every prunable tensor of a decoder or an encoder, accumulated clip by clip.

Memory does not grow with the number of clips: only one clip's activations are held at a time, and each tensor
leaves a C x C matrix and a mean.

Reference: arXiv 2602.19161, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.decoders.variants.exact import exact_coder
from flashvaed_cli.numerics.covariance import CovarianceAccumulator, TensorStatistics
from flashvaed_cli.progress import Progress


@torch.no_grad()
def collect_statistics(
    coder: Coder, clips: Iterable[Float[Tensor, "_B C _T _Hz _Wz"]], *, num_clips: int | None, progress: Progress
) -> dict[str, TensorStatistics]:
    """Run clips through a coder, and measure the covariance of every tensor that belongs to a channel group.

    Args:
        clips: raw latents (of an encoder, pixels), one clip (of any size) at a time; consumed once.
        num_clips: for the progress bar; None when unknown.
    Returns:
        Tensor address (see `decoders.spec.groups`) to its statistics.
    Raises:
        CalibrationError: NaN or infinite activations (named by their tensor), or no clip at all.
    """
    accumulators = {
        address: CovarianceAccumulator(width, label=f"activations of {address}")
        for address, width in tensor_widths(coder.spec).items()
    }
    coder = exact_coder(coder)
    device = next(coder.parameters()).device
    blocks = dict(coder.blocks())
    inside = {address: accumulator for address, accumulator in accumulators.items() if address not in blocks}
    handles = [_watch(coder.at(address), accumulator) for address, accumulator in inside.items()]
    try:
        with progress.task("covariances", num_clips) as task:
            for latents in clips:
                for address, x in coder.walk(coder.enter(latents.to(device))):
                    if address in accumulators:
                        accumulators[address].update(x)
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {
        address: TensorStatistics(accumulator.covariance().cpu(), accumulator.mean.cpu(), accumulator.count)
        for address, accumulator in accumulators.items()
    }


def _watch(module: nn.Module, accumulator: CovarianceAccumulator) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> None:
        accumulator.update(output)

    return module.register_forward_hook(hook)
