"""Low-rank layers as the dense kernels that they factorise, for layouts without factors."""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.operators import LowRankConv3d
from flashvaed_cli.decoders.spec.coders import BlockSpec, DecoderSpec


def expanded_spec(spec: DecoderSpec) -> DecoderSpec:
    """The spec with every `lowrank3d` layer as `causal3d`."""
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        dense = {
            name: layer.model_copy(update={"operator": "causal3d", "rank": None})
            for name, layer in block.layers.items()
            if layer.rank is not None
        }
        changed[address] = block.model_copy(update=dense)
    return spec.with_blocks(changed)


@torch.no_grad()
def expanded_decoder(decoder: Decoder) -> Decoder:
    """The same function with every `lowrank3d` layer as `causal3d`: the decoder itself if it has none."""
    spec = expanded_spec(decoder.spec)
    if spec == decoder.spec:
        return decoder
    dense = Decoder(spec).to(next(decoder.parameters())).eval().requires_grad_(False)
    state = decoder.state_dict()
    for name, module in decoder.named_modules():
        if isinstance(module, LowRankConv3d):
            del state[f"{name}.reduce"]
            state[f"{name}.weight"] = module.dense_kernel()
    dense.load_state_dict(state)
    return dense
