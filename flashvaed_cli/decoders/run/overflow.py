"""Find the first layer whose output is NaN or infinite, and say what to do about it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.errors import is_out_of_memory


def explain_overflow(decoder: Decoder, latents: Float[Tensor, "B C T Hz Wz"]) -> str:
    """The error message for frames that are not finite; names the first layer at fault.

    The latents are decoded once more, by themselves; if earlier latents are at fault, or memory does not suffice for
    them at once, no layer is named.

    Args:
        decoder: in the dtype that overflowed.
        latents: those of the frames that are not finite, in the same dtype.
    """
    dtype = str(next(decoder.parameters()).dtype).removeprefix("torch.")
    if not bool(torch.isfinite(latents).all()):
        return f"the latents hold NaN or infinite values in {dtype}. Check where they come from."
    try:
        where = first_overflow(decoder, latents) or "a layer"
    except (RuntimeError, MemoryError) as error:  # whole frames, without the tiles that the run may have needed
        if not is_out_of_memory(error):
            raise
        where = "a layer"
    narrow = dtype in ("float16", "bfloat16")
    advice = "Decode with --dtype " + ("bfloat16 or float32" if dtype == "float16" else "float32")
    if not narrow:
        advice = "The weights are damaged or do not belong together: get or make the decoder again"
    return f"the frames hold NaN or infinite values: {where} overflows {dtype}. {advice}."


@torch.no_grad()
def first_overflow(decoder: Decoder, latents: Float[Tensor, "B C T Hz Wz"]) -> str | None:
    """Address of the first layer or block whose output is not finite while its input is; None if all are finite."""
    found: list[str] = []

    def look(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
            return
        if all(bool(torch.isfinite(x).all()) for x in inputs if isinstance(x, Tensor)):
            found.append(names[module])

    names = {
        module: name.removeprefix("stages.").removeprefix("bypasses.")
        for name, module in decoder.named_modules()
        if name.count(".") >= 2
    }
    hooks = [module.register_forward_hook(look) for module in names]
    try:
        decoder(latents)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
