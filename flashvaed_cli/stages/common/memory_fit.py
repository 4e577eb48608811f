"""Whether a decoder fits into memory as asked, and otherwise with which limits it does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.predict.cost import Grid
from flashvaed_cli.decoders.predict.lookahead import usual_chunk
from flashvaed_cli.decoders.predict.planning import DecodePlan
from flashvaed_cli.decoders.run.runtime import plan_on
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.metrics.free_memory import free_bytes

_USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Limits:
    """Fixed settings of a decoder's run: chunk and tile in latents, memory in bytes; None leaves one open."""

    chunk: int | None = None
    tile: int | None = None
    max_memory_bytes: int | None = None


@dataclass(frozen=True)
class Fit:
    """The limits to run with, what to add to their description, and why it cannot run at all."""

    limits: Limits
    remark: str = ""
    refusal: str | None = None


def fit_to_memory(
    spec: DecoderSpec,
    latents: Float[Tensor, "B C T Hz Wz"],
    limits: Limits,
    *,
    channels_last: bool = True,
    compiled: bool = False,
) -> Fit:
    """Leave the limits as they are if that fits; else bound the memory, so that the runtime picks chunk and tile.

    If the user gives no bound, it is the memory that is free now.

    Args:
        channels_last: the layout that the decoder runs in.
        compiled: it runs in compiled steps.
    """

    def plan_within(limits: Limits) -> DecodePlan:
        return _plan(spec, latents, limits, channels_last=channels_last, compiled=compiled)

    bound, free = limits.max_memory_bytes, free_bytes(latents.device)
    if bound is None:
        needed = plan_within(limits).predicted_bytes + _output_bytes(spec, latents, limits)
        if free is None or needed <= _USABLE_SHARE * free:
            return Fit(limits, "" if limits.tile is None else f", tiles of {limits.tile} latents")
        bound = max(1, int(_USABLE_SHARE * free) - _output_bytes(spec, latents, Limits(chunk=1)))
    bounded = replace(limits, max_memory_bytes=bound)
    try:
        plan = plan_within(bounded)
    except DecodeError as error:
        return Fit(limits, refusal=str(error))
    chunk = "" if limits.chunk is not None else f", chunk {plan.chunk}"
    tile = "" if plan.tile is None else f", tiles of {plan.tile} latents"
    return Fit(bounded, f"{chunk}{tile} (within {bound / 1e9:.3g} GB)")


def streaming_limits(
    spec: DecoderSpec, grid: Grid, limits: Limits, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Limits:
    """The limits for decoding a clip of any length whose frames are not kept.

    If the user gives neither chunk nor bound: a few latents at a time, or as many as fit into the memory free now.

    Args:
        grid: latent frames, height and width of the clip.
        compiled: the decoder runs in compiled steps.
    """
    if limits.chunk is not None or limits.max_memory_bytes is not None:
        return limits
    usual, free = replace(limits, chunk=usual_chunk(spec)), free_bytes(device)
    plan = plan_on(device, spec, grid, dtype, chunk=usual.chunk, tile=usual.tile, compiled=compiled)
    if free is None or plan.predicted_bytes <= _USABLE_SHARE * free:
        return usual
    return replace(limits, max_memory_bytes=max(1, int(_USABLE_SHARE * free)))


def refusal_at_chunk_one(spec: DecoderSpec, latents: Float[Tensor, "B C T Hz Wz"]) -> str | None:
    """Why a decoder without tiles does not fit at one latent frame at a time; None if it does."""
    free, limits = free_bytes(latents.device), Limits(chunk=1)
    needed = _plan(spec, latents, limits, channels_last=False, compiled=True).predicted_bytes + _output_bytes(
        spec, latents, limits
    )
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def _plan(
    spec: DecoderSpec,
    latents: Float[Tensor, "B C T Hz Wz"],
    limits: Limits,
    *,
    channels_last: bool,
    compiled: bool = False,
) -> DecodePlan:
    """As the runtime plans; compiled or in diffusers, nothing runs in bands."""
    return plan_on(
        latents.device,
        spec,
        (latents.shape[2], latents.shape[3], latents.shape[4]),
        latents.dtype,
        **vars(limits),
        channels_last=channels_last,
        compiled=compiled,
        batch=latents.shape[0],
    )


def _output_bytes(spec: DecoderSpec, latents: Float[Tensor, "B C T Hz Wz"], limits: Limits) -> int:
    """The frames of the whole clip, which the prediction leaves out if they come in parts."""
    if limits.chunk is None and limits.tile is None:
        return 0
    t, h, w = latents.shape[2:]
    num_frames = spec.num_frames(t)
    return 3 * num_frames * h * w * spec.spatial_factor**2 * latents.element_size()
