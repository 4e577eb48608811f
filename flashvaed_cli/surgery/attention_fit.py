"""Narrow the inner width of attention at no loss beyond that of the narrower stream.

Over W channels of the stream, the logits are a bilinear form of rank W at most: the bias of the keys adds the same to
every key, which softmax drops. Values and projection are one W x W matrix, and their bias passes softmax unchanged,
since its weights add up to one. So an inner width of W can stand for any larger one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import Attention


@torch.no_grad()
def set_collapsed(
    block: Attention,
    qkv_weight: Float[Tensor, "I3 W"],
    qkv_bias: Float[Tensor, " I3"],
    proj_weight: Float[Tensor, "W I"],
    proj_bias: Float[Tensor, " W"],
) -> None:
    """Make `block`, with inner width W, compute what attention with inner width I does on the same stream.

    Args:
        qkv_weight: of queries, keys and values, one below the other, on the W channels that `block` reads.
        proj_weight: from the I values to the W channels that `block` writes.
    """
    (query, key, value), (query_bias, _, value_bias) = qkv_weight.double().chunk(3), qkv_bias.double().chunk(3)
    width = qkv_weight.shape[1]
    form = torch.cat([query, query_bias[:, None]], dim=1).T @ key  # [W + 1, W]
    form *= (width / query.shape[0]) ** 0.5  # the logits are divided by the root of the inner width
    left, sizes, right = torch.linalg.svd(form, full_matrices=False)
    root = sizes.sqrt()
    queries, keys = (left * root).T, root[:, None] * right  # [W, W + 1] and [W, W]
    matrix = proj_weight.double() @ value
    block.qkv.weight.copy_(torch.cat([queries[:, :-1], keys, matrix]).reshape(block.qkv.weight.shape))
    block.qkv.bias.copy_(torch.cat([queries[:, -1], form.new_zeros(2 * width)]))
    block.proj.weight.copy_(torch.eye(width).reshape(block.proj.weight.shape))
    block.proj.bias.copy_(proj_bias.double() + proj_weight.double() @ value_bias)
