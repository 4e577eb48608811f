"""From spec to module: one class serves every encoder and decoder, original, pruned or converted."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.blocks import build_block
from flashvaed_cli.decoders.operators import Future, Past
from flashvaed_cli.decoders.spec import BlockSpec, CoderSpec, DecoderSpec, EncoderSpec


class Coder(nn.Module):
    """Runs the blocks of its spec in order. Parameters are named `stages.STAGE.INDEX.LAYER.weight`."""

    def __init__(self, spec: CoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleDict(
            {
                stage.name: nn.ModuleList(
                    build_block(block, f"{stage.name}.{index}") for index, block in enumerate(stage.blocks)
                )
                for stage in spec.stages
            }
        )

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O F Hp Wp"]:
        """Run one chunk. `past` is the `future` that the chunk before it filled; None for the first."""
        for _, block in self.blocks():
            x = block(x, past, future)
        return x

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block with its address, in forward order."""
        for stage, blocks in self.stages.items():
            for index, block in enumerate(blocks):  # type: ignore[arg-type]
                yield f"{stage}.{index}", block

    def at(self, address: str) -> nn.Module:
        """The block or layer at an address such as `up2.0` or `up2.0.conv1`. Raises KeyError."""
        stage, index, *rest = address.split(".")
        module = self.stages[stage][int(index)]  # type: ignore[index]
        for name in rest:
            module = getattr(module, name)
        return module

    def spec_of(self, address: str) -> BlockSpec:
        """The spec of the block at an address such as `up2.0`. Raises KeyError."""
        stage, index = address.split(".")
        return self.spec.stage(stage).blocks[int(index)]

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


class Decoder(Coder):
    """Raw latents `[B, C, T, Hz, Wz]` to pixels `[B, 3, F, H, W]`, nominally in [-1, 1], not clamped."""

    spec: DecoderSpec

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)


class Encoder(Coder):
    """Pixels in [-1, 1] to the raw latents' mean and log-variance on the channel axis."""

    spec: EncoderSpec

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
