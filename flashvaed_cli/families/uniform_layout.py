"""Whether a coder fits code written for the original: only if it is the original at another base width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, ConvBlockSpec, HeadSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.naf_blocks import CellHeadSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import encoder_like


@dataclass(frozen=True)
class UniformFit:
    """`base_width` if the decoder is the original at that width, else None and the first `deviation`."""

    base_width: int | None
    deviation: str | None


def fits_uniform_layout(spec: DecoderSpec, original: Callable[[int, int], DecoderSpec]) -> UniformFit:
    """Compare with the original at the base width that the head shows, layer by layer.

    Args:
        original: the family's builder, base width and latent width to spec.
    """
    blocks = [block for _, block in spec.blocks()]
    head = next((block for block in reversed(blocks) if isinstance(block, CellHeadSpec | HeadSpec)), blocks[-1])
    if isinstance(head, CellHeadSpec):
        base_width = head.video_low.in_width
    elif isinstance(head, HeadSpec):
        base_width = head.conv.in_width
    else:
        return UniformFit(None, f"the last block is a {head.kind}, not a head")
    try:
        uniform = original(base_width, spec.latent_width)
    except ValueError:  # its blocks cannot divide such widths
        return UniformFit(None, f"no original ends with {base_width} channels")
    except SpecError:  # its description fits no original
        return UniformFit(None, "it is made of other blocks than the original")
    deviation = _first_deviation(spec, uniform)
    if deviation is None:
        return UniformFit(base_width, None)
    return UniformFit(None, f"against the original at the head's base width, {base_width}: {deviation}")


def encoder_base_width(spec: EncoderSpec) -> int | None:
    """The base width at which an encoder is its family's original; None if it is another network."""
    first = spec.stages[0].blocks[0]
    if not isinstance(first, ConvBlockSpec):
        return None
    base_width = first.conv.out_width
    try:
        uniform = encoder_like(spec)(base_width, spec.latent_width)
    except ValueError:
        return None
    return base_width if uniform == spec else None


def _first_deviation(spec: CoderSpec, uniform: CoderSpec) -> str | None:
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
    ours, theirs = block.layers, expected.layers
    name = next((name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)), None)
    if name is None:
        return f"{address} has other norms, noise or factors"
    return f"{address}.{name} is {_layer(ours.get(name))}, not {_layer(theirs.get(name))}"


def _layer(layer: ConvSpec | None) -> str:
    if layer is None:
        return "absent"
    return f"{layer.operator} {layer.in_width} to {layer.out_width} with kernel {'x'.join(map(str, layer.kernel))}"
