"""Does a decoder fit code that was written for the original? Only if it is the original at another base width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashvaed_cli.decoders.layer_spec import AttentionSpec, BlockSpec, ConvSpec, HeadSpec, block_layers
from flashvaed_cli.decoders.spec import DecoderSpec


@dataclass(frozen=True)
class UniformFit:
    """`base_width` if the decoder is the original at that width, else None and the first `deviation`."""

    base_width: int | None
    deviation: str | None

    def notes(self, encoder_base_width: int | None = None) -> tuple[str, ...]:
        """Where a checkpoint in the original layout loads, for the export's notes.

        Args:
            encoder_base_width: that of the encoder in the same file; None if the file has none.
        """
        if self.base_width is None:
            return (
                f"not a uniform decoder ({self.deviation}): ComfyUI and diffusers need this program's decoder "
                "in place of theirs",
            )
        diffusers = f"diffusers loads it with decoder_base_dim={self.base_width}"
        if encoder_base_width == self.base_width:
            return (diffusers, "ComfyUI loads it: encoder and decoder have the same base width")
        lacks = "no encoder" if encoder_base_width is None else f"an encoder of base width {encoder_base_width}"
        return (
            diffusers,
            f"ComfyUI does not: it wants an encoder of base width {self.base_width}, the file has {lacks}",
        )


def fits_uniform_layout(spec: DecoderSpec, original: Callable[[int, int], DecoderSpec]) -> UniformFit:
    """Compare with the original at the base width that the head shows, layer by layer.

    Args:
        original: the family's builder, base width and latent width to spec.
    """
    head = spec.stages[-1].blocks[-1]
    if not isinstance(head, HeadSpec):
        return UniformFit(None, f"the last block is a {head.kind}, not a head")
    base_width = head.conv.in_width
    try:
        uniform = original(base_width, spec.latent_width)
    except ValueError:  # widths that do not divide as its blocks need
        return UniformFit(None, f"no original ends with {base_width} channels")
    deviation = _first_deviation(spec, uniform)
    if deviation is None:
        return UniformFit(base_width, None)
    return UniformFit(None, f"against the original at the head's base width, {base_width}: {deviation}")


def _first_deviation(spec: DecoderSpec, uniform: DecoderSpec) -> str | None:
    if spec == uniform:
        return None
    found = dict(spec.blocks())
    for address, expected in uniform.blocks():
        block = found.pop(address, None)
        if block is None:
            return f"{address}, a {expected.kind}, is absent"
        if block != expected:
            return _describe(address, block, expected)
    if found:
        return f"{next(iter(found))} is one block too many"
    return "another family, or other factors in time and space"


def _describe(address: str, block: BlockSpec, expected: BlockSpec) -> str:
    if block.kind != expected.kind:
        return f"{address} is of kind {block.kind}, not {expected.kind}"
    if isinstance(block, AttentionSpec) and isinstance(expected, AttentionSpec):
        return (
            f"{address} has width {block.width} and {block.inner_width} inside, "
            f"not {expected.width} and {expected.inner_width}"
        )
    ours, theirs = block_layers(block), block_layers(expected)
    name = next(name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name))
    return f"{address}.{name} is {_layer(ours.get(name))}, not {_layer(theirs.get(name))}"


def _layer(layer: ConvSpec | None) -> str:
    if layer is None:
        return "absent"
    return f"{layer.operator} {layer.in_width} to {layer.out_width} with kernel {'x'.join(map(str, layer.kernel))}"
