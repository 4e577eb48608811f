"""The noise of LTX-Video 0.9.1, which the program leaves out: to compare the scales that it reads with diffusers'.

The original draws a map of noise per convolution, one for all frames, and adds it times a learned scale per channel.
Here a seed gives the same frames for every chunk size (of a causal decoder).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import ResBlock
from flashvaed_cli.decoders.modules.coder import Coder


@contextmanager
def injected_noise(coder: Coder, *, seed: int) -> Iterator[None]:
    """Within this context the coder adds its noise; maps are drawn once per layer, in forward order, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    handles = [
        layer.register_forward_hook(_adder(scale, generator))
        for _, block in coder.blocks()
        if isinstance(block, ResBlock) and hasattr(block, "noise1")
        for layer, scale in ((block.conv1, block.noise1), (block.conv2, block.noise2))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(scale: Tensor | nn.Module, generator: torch.Generator):
    assert isinstance(scale, Tensor)
    drawn: dict[tuple[int, int], Tensor] = {}

    def add(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> Tensor:
        size = (output.shape[3], output.shape[4])
        if size not in drawn:
            drawn[size] = torch.randn(size, generator=generator)
        return output + scale.view(1, -1, 1, 1, 1) * drawn[size].to(output)

    return add
