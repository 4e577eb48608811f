"""A checkpoint's decoder with the settings of `decode`: latents in, frames out, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.predict.lookahead import chunk_spans
from flashvaed_cli.decoders.predict.planning import DecodePlan
from flashvaed_cli.decoders.run.less_memory import Steps, described, in_steps, release_memory, smaller_steps
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder, plain_decoder
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.decode import DecodeRecipe
from flashvaed_cli.recipe.fields import LatentScale
from flashvaed_cli.recipe.quantities import parse_memory
from flashvaed_cli.stages.common.clips import to_raw
from flashvaed_cli.stages.common.loading import DTYPES, warn_of_slow_format
from flashvaed_cli.stages.common.memory_fit import Limits, streaming_limits


class Player:
    """Decodes clips with exact operators, which give the same frames faster. `plan` is that of the last clip."""

    plan: DecodePlan

    def __init__(self, checkpoint: Checkpoint, recipe: DecodeRecipe, device: torch.device) -> None:
        """Prepare the decoder.

        Raises:
            ArtifactError: no decoder.
            DecodeError: it is to be compiled, and this machine has no compiler.
            SpecError: a clip length that it does not have, or that does not fit.
        """
        self.latent_width = checkpoint.latent_width
        self._checkpoint, self._recipe, self._device = checkpoint, recipe, device
        decoder = plain_decoder(checkpoint.require_decoder()).to(device)
        self._decoder = exact_decoder(decoder, device_type=device.type)
        spec = decoder.spec
        self.spec = spec if recipe.clip_length is None else spec.with_clip_length(recipe.clip_length)
        memory = None if recipe.max_memory is None else parse_memory(recipe.max_memory)
        self._asked = Limits(recipe.chunk, recipe.tile, memory)
        self._runtime: tuple[Limits, DecodeRuntime] | None = None
        self._is_format_checked = False

    @torch.no_grad()
    def frames(self, latents: Float[Tensor, "1 C T Hz Wz"], scale: LatentScale) -> Iterator[Float[Tensor, "3 F H W"]]:
        """The frames of a clip, in the runtime's dtype, clamped to [-1, 1].

        Raises:
            ArtifactError: normalized latents, and the checkpoint has no statistics.
            DecodeError: no plan fits the memory.
            SpecError: the latents do not fit the decoder.
            NonFiniteError: frames hold NaN or infinite values.
        """
        _, _, num_latents, height, width = latents.shape
        grid = (num_latents, height, width)
        asked, dtype = self._asked_for(num_latents), DTYPES[self._recipe.dtype]
        limits = streaming_limits(self.spec, grid, asked, dtype, self._device, compiled=self._recipe.compile)
        runtime = self._prepared(limits)
        self.plan = runtime.plan(latents)
        spans = chunk_spans(num_latents, self.plan.chunk)
        parts = (to_raw(latents[:, :, start:stop].float(), scale, self._checkpoint) for start, stop in spans)
        for frames in runtime.iter_parts(parts, num_latents=num_latents):
            yield frames[0]

    def warn_of_slow_format(self, latents: Float[Tensor, "1 C T Hz Wz"], progress: Progress) -> None:
        """Warn once, before the first clip that takes long, where float32 would be faster."""
        if not self._is_format_checked:
            gflop = total_gflop(self.spec, (latents.shape[2], latents.shape[3], latents.shape[4]))
            self._is_format_checked = warn_of_slow_format(self._recipe.dtype, self._device, gflop, progress)

    def _asked_for(self, num_latents: int) -> Limits:
        """The limits that the user gives; a clip whose state grows is compiled in one step."""
        in_one_step = self._recipe.compile and self.spec.grows_state and self._asked.chunk is None
        return replace(self._asked, chunk=num_latents) if in_one_step else self._asked

    def smaller_steps(self, latents: Float[Tensor, "1 C T Hz Wz"]) -> Steps | None:
        """The next smaller steps, for latents that the last ones had no memory for; None: there are none."""
        if self._runtime is None:
            return None  # it ran out before the first step
        return smaller_steps([self.spec], self.plan.chunk, self.plan.tile, max(latents.shape[3:]))

    def step_down(self, latents: Float[Tensor, "1 C T Hz Wz"]) -> str:
        """Take these smaller steps from now on; returns them in words."""
        steps = self.smaller_steps(latents)
        assert self._runtime is not None and steps is not None
        self._asked = Limits(*steps)
        self._runtime = (self._asked, in_steps(self._runtime[1], steps))
        release_memory(self._device)
        return described(steps)

    def _prepared(self, limits: Limits) -> DecodeRuntime:
        """The runtime of the limits; that of the last clip where they are the same."""
        if self._runtime is None or self._runtime[0] != limits:
            settings = DecodeSettings(
                chunk=limits.chunk,
                tile=limits.tile,
                dtype=DTYPES[self._recipe.dtype],
                compile=self._recipe.compile,
                max_memory_bytes=limits.max_memory_bytes,
                clip_length=self._recipe.clip_length,
            )
            self._runtime = (limits, DecodeRuntime(self._decoder, settings, shares_weights=True))
        return self._runtime[1]
