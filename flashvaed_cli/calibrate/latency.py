"""Where a decoder's time goes: milliseconds per stage and operator, measured, not estimated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import Attention
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.norms import Norm
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.spec.addresses import stage_of

Profiler = Callable[[Decoder, Callable[[], object], list[str]], dict[str, float]]
"""Median milliseconds of named modules within one call; see `metrics.module_times.profile_modules`."""

OTHER = "other"
"""Time outside all named modules: activations, additions, interpolation, copies."""


@torch.no_grad()
def measure_latency(
    decoder: Decoder, latents: Float[Tensor, "1 C T Hz Wz"], profile: Profiler
) -> dict[str, dict[str, float]]:
    """Stage to operator to milliseconds, in forward order; a stage's values add up to its whole time.

    Args:
        profile: measures named modules, blocks and the layers in them alike.
    """
    blocks = {f"stages.{a}": stage_of(a) for a, _ in decoder.blocks()}
    blocks |= {f"bypasses.{stage}": stage for stage in decoder.bypasses}
    layers = {
        name: module.spec.operator if isinstance(module, Conv) else "norm"
        for name, module in decoder.named_modules()
        if isinstance(module, Conv | Norm) and not isinstance(_parent(decoder, name), Attention)
    }
    layers |= {f"stages.{a}": "attention" for a, block in decoder.blocks() if isinstance(block, Attention)}
    timed = [name for name in layers if _runs(decoder, name, latents)]
    milliseconds = profile(decoder, lambda: decoder(latents), list(dict.fromkeys([*blocks, *timed])))
    table: dict[str, dict[str, float]] = {stage.name: {} for stage in decoder.spec.stages}
    for name in timed:
        stage = name.split(".")[1]
        table[stage][layers[name]] = table[stage].get(layers[name], 0.0) + milliseconds[name]
    for stage, operators in table.items():
        whole = sum(milliseconds[name] for name, owner in blocks.items() if owner == stage)
        operators[OTHER] = max(whole - sum(operators.values()), 0.0)
    return table


def _parent(decoder: Decoder, name: str) -> torch.nn.Module:
    return decoder.get_submodule(name.rpartition(".")[0])


def _runs(decoder: Decoder, name: str, latents: Tensor) -> bool:
    """A temporal upsampler does not run on a single latent frame."""
    return not (name.endswith(".temporal") and latents.shape[2] == 1)
