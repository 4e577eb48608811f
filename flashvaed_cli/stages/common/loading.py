"""What every stage does first: find the input, choose the device, load checkpoint and original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.original import load_original
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.variants.exact import plain_decoder
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.metrics.roofline import float32_speedup
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.settings import CommandRecipe, StageRecipe
from flashvaed_cli.zoo.builtin import BUILTINS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_GFLOP = 500.0
"""Less work takes seconds, unless the processor has no instructions for half precision at all."""
_MUCH_FASTER = 1.25


def choose_device(name: str) -> torch.device:
    """The device that a recipe names, as `cuda` or `cuda:1`; `gpu` takes CUDA or MPS, `auto` either of them or the CPU.

    Raises:
        FlashVaedError: this machine does not have it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    asked = name
    if name == "gpu":
        name = "mps" if available["mps"] else "cuda"
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" and available["cuda"] else 1
    if not available[device.type] or (device.index or 0) >= count:
        listed = [kind for kind, there in available.items() if there]
        if available["cuda"]:
            listed += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise FlashVaedError(
            f"--device {asked}: this machine has none that torch can use; available: {', '.join(listed)}"
        )
    return device


def warn_of_slow_format(dtype: str, device: torch.device, gflop: float, progress: Progress) -> bool:
    """Warn if this processor multiplies numbers of the format more slowly than float32.

    Returns whether that was looked at: on the CPU, for work that takes long.
    """
    if device.type != "cpu" or dtype == "float32" or gflop < FEWEST_GFLOP:
        return False
    if (gain := float32_speedup(DTYPES[dtype])) > _MUCH_FASTER:
        progress.warn(
            f"this processor multiplies float32 {gain:.1f} times as fast as {dtype}: --dtype float32 takes less time, "
            "and more memory"
        )
    return True


def choose_input(given: str | None, recipe_type: type[CommandRecipe], progress: Progress) -> str:
    """The input given, or the first default that exists; says which."""
    if given is not None:
        return given
    defaults = recipe_type.default_inputs
    chosen = next(place for place in defaults if ":" in place or Path(place).exists())
    progress.log(f"input: {chosen}" + ("" if chosen == defaults[0] else f" ({defaults[0]} is not here)"))
    if (newer := _newer_than(chosen, defaults)) is not None:
        progress.warn(
            f"{chosen} is older than {newer}, which may be the one you mean: name the one to take, or make {chosen} "
            "again"
        )
    return chosen


def _newer_than(chosen: str, defaults: Sequence[str]) -> str | None:
    """The first of the later defaults whose file is newer than the chosen one; None if none is."""
    if ":" in chosen:
        return None
    made = Path(chosen).stat().st_mtime
    others = (place for place in defaults[defaults.index(chosen) + 1 :] if ":" not in place and Path(place).exists())
    return next((place for place in others if Path(place).stat().st_mtime > made), None)


@dataclass(frozen=True)
class Inputs:
    """A decoder to work on and the original that it descends from (itself, if it is one), on one device."""

    checkpoint: Checkpoint
    original: Checkpoint
    device: torch.device

    def reference(self) -> Decoder:
        """The original's decoder; its still variant if the decoder to work on takes single images."""
        original = self.original.require_decoder()
        is_still = self.checkpoint.require_decoder().spec.still
        return still_decoder(original) if is_still and not original.spec.still else original


class InputSettings(TypedDict):
    """The settings of a recipe for loading files; see `load_inputs`."""

    original: str | None
    family: str | None
    weights: str | None
    allow_download: bool


def input_settings(recipe: StageRecipe) -> InputSettings:
    """The settings of a recipe for loading files."""
    return InputSettings(
        original=recipe.original,
        family=recipe.family,
        weights=recipe.weights,
        allow_download=recipe.allow_download,
    )


def load_inputs(
    location: str,
    *,
    original: str | None,
    family: str | None,
    device: torch.device,
    progress: Progress,
    weights: str | None = None,
    allow_download: bool = False,
) -> Inputs:
    """Load a checkpoint and its original, both moved to the device, with plain operators.

    Exact operators are only a way to run a decoder; pruning, conversion, training and export work on the plain network.

    Args:
        original: given by the user, overrides the one that the checkpoint records.
        family, weights: see `load_checkpoint`.
        allow_download: the original may be fetched from the address that the checkpoint records.
    Raises:
        ArtifactError: not found, unreadable, not the original of the checkpoint, or weights that are not finite.
    """
    checkpoint = with_plain_operators(load_input(location, family, progress, weights=weights, original=original))
    parent = with_plain_operators(
        load_original(checkpoint, original, BUILTINS, needs_encoder=False, allow_download=allow_download)
    )
    if parent.location != checkpoint.location:
        _warn_of(parent, progress)
    for loaded in (checkpoint, parent):
        for coder in (loaded.decoder, loaded.encoder):
            if coder is not None:
                coder.to(device)
    return Inputs(checkpoint, parent, device)


def load_input(
    location: str,
    family: str | None,
    progress: Progress,
    *,
    weights: str | None = None,
    original: str | None = None,
) -> Checkpoint:
    """Load a checkpoint; if its names and configuration fit several families, log which one is taken.

    Parts that the checkpoint lacks are warned of.

    Raises:
        ArtifactError: not found, unreadable or not of that family.
    """
    checkpoint = load_checkpoint(location, builtins=BUILTINS, family=family, weights=weights, original=original)
    if checkpoint.twins:
        others = " and ".join(checkpoint.twins)
        progress.log(
            f"{location}: fits {checkpoint.family} and {others} alike, one network with one set of latent statistics; "
            f"taken as {checkpoint.family} (--family {checkpoint.twins[0]} if it is that: only the name in "
            "artifacts and the class in exports change)"
        )
    _warn_of(checkpoint, progress)
    return checkpoint


def _warn_of(checkpoint: Checkpoint, progress: Progress) -> None:
    for note in checkpoint.notes:
        progress.warn(f"{checkpoint.location}: {note}")


def with_plain_operators(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its decoder's exact operators replaced by the plain ones that they stand for."""
    return replace(checkpoint, decoder=plain_decoder(checkpoint.require_decoder()))
