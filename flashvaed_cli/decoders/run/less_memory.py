"""When memory runs out: the same clip again in smaller chunks, then in smaller tiles, until it fits or none is left.

Frames are those that the smaller chunk or tile gives from the beginning: nothing of the attempt that failed is kept.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.predict.lookahead import least_useful_chunk
from flashvaed_cli.decoders.predict.tiling import split_addresses
from flashvaed_cli.decoders.run.runtime import DecodeRuntime
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import is_out_of_memory

Steps = tuple[int | None, int | None]
"""Latent frames per step, and the side of tiles in latents; None: all at once, whole frames."""
TILES = (64, 32, 16, 8)


def smaller_steps(specs: Iterable[DecoderSpec], chunk: int, tile: int | None, longer_side: int | None) -> Steps | None:
    """The next chunk, half of the last or less and a power of two, or else the next tile; None: neither gets smaller.

    Of a decoder that sees frames ahead, chunks shorter than its halo take hardly less memory: tiles come first.

    Args:
        specs: of the decoders that are to take these steps.
        chunk: that was too large.
        longer_side: of frames, in latents; None: unknown.
    """
    specs = tuple(specs)
    if any(not spec.sees_whole_clip and chunk > least_useful_chunk(spec) for spec in specs):
        return 1 << ((chunk // 2).bit_length() - 1), tile
    largest = min((side for side in (tile, longer_side) if side is not None), default=TILES[0] + 1)
    smaller = next((side for side in TILES if side < largest), None)
    return (chunk, smaller) if smaller is not None and all(map(split_addresses, specs)) else None


def in_steps(runtime: DecodeRuntime, steps: Steps) -> DecodeRuntime:
    """The same weights in other steps, without a limit of the predicted memory."""
    other = copy.copy(runtime)
    other.settings = replace(runtime.settings, chunk=steps[0], tile=steps[1], max_memory_bytes=None)
    return other


def described(steps: Steps) -> str:
    """`chunk 2, tile 32`."""
    return ", ".join(f"{name} {value}" for name, value in zip(("chunk", "tile"), steps, strict=True) if value)


def decode_in_memory(
    runtime: DecodeRuntime, latents: Float[Tensor, "B C T Hz Wz"], tell: Callable[[str], object]
) -> Float[Tensor, "B 3 F H W"]:
    """All frames of raw latents, as `DecodeRuntime.decode` gives them; in smaller steps where memory runs out.

    Args:
        tell: told of every smaller step.
    Raises:
        As `DecodeRuntime.decode`; and its own error where memory runs out in the smallest steps too.
    """
    while True:
        try:
            return runtime.decode(latents)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            plan = runtime.plan(latents)
            steps = smaller_steps([runtime.spec], plan.chunk, plan.tile, max(latents.shape[3:]))
            if steps is None:
                raise
        runtime = in_steps(runtime, steps)
        release_memory(runtime.device)
        tell(f"out of memory: decoding again with {described(steps)}")


def release_memory(device: torch.device) -> None:
    """Let go of what a failed attempt left behind; its traceback must be gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
