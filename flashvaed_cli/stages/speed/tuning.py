"""`--autotune`: the fastest way to run one decoder at one size, tried once per machine and remembered."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.metrics.autotune import (
    Choice,
    Tuning,
    autotune,
    cache_key,
    choice_file,
    remember_choice,
    remembered_choice,
)
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress
from flashvaed_cli.stages.common.memory_fit import Limits, fit_to_memory
from flashvaed_cli.stages.speed.contestants import Call, Latents, own_call


def tuned_choice(
    name: str, decoder: Decoder, latents: Latents, limits: Limits, *, with_compile: bool, progress: Progress
) -> tuple[Choice, str]:
    """The remembered choice, or else the fastest of those tried now, which is remembered.

    Args:
        name: of the decoder, as shown.
        decoder: with plain operators.
        limits: what the user fixed; part of what a choice is remembered under.
        with_compile: try compiling too.
    Returns:
        The choice and a note on where it comes from.
    """
    grid = (latents.shape[2], latents.shape[3], latents.shape[4])
    key = cache_key(decoder.spec, grid, latents.dtype, latents.device, **vars(limits), compiler=with_compile)
    with contextlib.suppress(FileNotFoundError):
        if (choice := remembered_choice(path := choice_file(key), key)) is not None:
            return choice, f"{name}: {choice} (remembered in {path})"

    def prepare(candidate: Choice) -> Call:
        layout = candidate.memory_format == "channels-last"
        asked = replace(limits, chunk=candidate.chunk)
        fit = fit_to_memory(decoder.spec, latents, asked, channels_last=layout, compiled=candidate.compile)
        if fit.refusal is not None:
            raise MemoryError(fit.refusal)
        return own_call(decoder, latents, candidate, fit.limits)

    progress.log(f"autotune: {name}")
    try:
        tuning = autotune(
            prepare,
            latents.device,
            num_latents=latents.shape[2],
            fixed_chunk=limits.chunk,
            with_compile=with_compile,
            progress=progress,
        )
    except MemoryError:
        return Choice(chunk=limits.chunk), f"{name}: no way of running it that was tried fits into memory"
    threads = f", for {counted(torch.get_num_threads(), 'thread')}" if latents.device.type == "cpu" else ""
    return tuning.choice, f"{name}: {_told(tuning)}. {_kept(key, tuning.choice)}{threads}"


def _told(tuning: Tuning) -> str:
    slowest = max(seconds for _, seconds in tuning.tried)
    fastest = min(seconds for _, seconds in tuning.tried)
    return f"{tuning.choice} is the fastest of {len(tuning.tried)} ways tried ({fastest:.3g} to {slowest:.3g} s)"


def _kept(key: str, choice: Choice) -> str:
    path: Path | None = None
    try:
        remember_choice(path := choice_file(key), key, choice)
    except OSError as error:
        return f"It could not be remembered{'' if path is None else f' in {path}'}: {error.strerror}"
    return f"Remembered in {path}"
