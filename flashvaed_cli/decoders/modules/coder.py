"""From spec to module: one class serves every encoder and decoder, original, pruned or converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import build_block
from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.operators import Future, Past
from flashvaed_cli.decoders.modules.patches import patchify, unpatchify
from flashvaed_cli.decoders.spec.addresses import split_block
from flashvaed_cli.decoders.spec.blocks import BlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec


class Coder(nn.Module):
    """Runs the blocks of its spec in order.

    Parameters are named `stages.STAGE.INDEX.LAYER.weight` and, of a bypass, `bypasses.STAGE.conv.weight`.
    """

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
        self.bypasses = nn.ModuleDict(
            {s.name: Bypass(s.bypass, address) for address, s in spec.bypassed().items() if s.bypass is not None}
        )

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O F Hp Wp"]:
        """Run one chunk. `past` is the `future` that the chunk before it filled; None for the first."""
        return self.run(x, past, future)

    def run(
        self,
        x: Float[Tensor, "B C T H W"],
        past: Past = None,
        future: Future = None,
        *,
        start: str | None = None,
        stop: str | None = None,
    ) -> Float[Tensor, "B O F Hp Wp"]:
        """Run the blocks from the address `start` up to, but without, `stop`; the outer ends take and give pixels."""
        if start is None:
            x = self.enter(x)
        for _, output in self.walk(x, past, future, start=start, stop=stop):
            x = output
        return self.leave(x) if stop is None else x

    def walk(
        self,
        x: Float[Tensor, "B C T H W"],
        past: Past = None,
        future: Future = None,
        *,
        start: str | None = None,
        stop: str | None = None,
        call: Callable[..., Tensor] | None = None,
    ) -> Iterator[tuple[str, Float[Tensor, "B O F Hp Wp"]]]:
        """Run the blocks one after another; yields the address and the output of each, bypasses included.

        The only way to run blocks: all code that needs the tensors between them walks.

        Args:
            x: the input of the block at `start`.
            start: address of the first block; not inside a stage that has a bypass.
            stop: address of the first block that does not run.
            call: runs a block, given it and its arguments; None: the block is called.
        """
        entering: Tensor | None = None  # held only while a bypass waits for it
        for address, block in self._between(start, stop):
            stage, index = split_block(address)
            if stage in self.bypasses and index == 0:
                entering = x
            x = block(x, past, future) if call is None else call(block, x, past, future)
            if entering is not None and index + 1 == len(self.blocks_of(stage)):
                x = self.bypasses[stage](x, entering, is_first=past is None)
                entering = None
            yield address, x

    def enter(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B Cp T Hp Wp"]:
        """The first block's input: an encoder's pixels become patches.

        Raises:
            SpecError: several latent frames for a decoder of single images.
        """
        if self.spec.still:
            self.spec.require_length(x.shape[2])
        if isinstance(self.spec, EncoderSpec) and self.spec.opaque:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1), value=1.0)  # [B, 4, T, H, W]
        return patchify(x, self.spec.patch) if self.spec.role == "encoder" else x

    def leave(self, x: Float[Tensor, "B Cp F Hp Wp"]) -> Float[Tensor, "B O F H W"]:
        """The coder's output: a decoder's patches become pixels."""
        return unpatchify(x, self.spec.patch) if self.spec.role == "decoder" else x

    def _between(self, start: str | None, stop: str | None) -> list[tuple[str, nn.Module]]:
        blocks = list(self.blocks())
        addresses = [address for address, _ in blocks]
        first = 0 if start is None else addresses.index(start)
        return blocks[first : None if stop is None else addresses.index(stop)]

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block with its address, in forward order."""
        for stage in self.stages:
            for index, block in enumerate(self.blocks_of(stage)):
                yield f"{stage}.{index}", block

    def at(self, address: str) -> nn.Module:
        """The block or layer at an address such as `up2.0`, `up2.0.conv1` or `up2.3.bypass`. Raises KeyError."""
        stage, index, *rest = address.split(".")
        if rest == ["bypass"]:
            return self.bypass_of(stage).get_submodule("conv")
        module = self.blocks_of(stage)[int(index)]
        for name in rest:
            module = getattr(module, name)
        return module

    def blocks_of(self, stage: str) -> nn.ModuleList:
        """The blocks of a stage, which may be replaced. Raises KeyError."""
        blocks = self.stages[stage]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def bypass_of(self, stage: str) -> Bypass:
        """The bypass around a stage. Raises KeyError."""
        bypass = self.bypasses[stage]
        assert isinstance(bypass, Bypass)
        return bypass

    def spec_of(self, address: str) -> BlockSpec:
        """The spec of the block at an address such as `up2.0`. Raises KeyError."""
        stage, index = split_block(address)
        return self.spec.stage(stage).blocks[index]

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


CoderT = TypeVar("CoderT", bound=Coder)


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
