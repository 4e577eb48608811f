"""From the files that a distillation recipe names to encoded clips, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cache_key import CacheKey, stamp_file
from flashvaed_cli.media.cuts import (
    Bucket,
    ClipCut,
    CutPlan,
    CutSettings,
    LatentGrid,
    decoding_jobs,
    file_order,
    load_cuts,
    measure_file,
    none_usable,
    plan_cuts,
)
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.media.video import from_bytes
from flashvaed_cli.media.workers import FileWorkers, default_num_workers
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.fields import LatentScale
from flashvaed_cli.stages.common.clips import encode_clip, find_data, scale_of, to_raw
from flashvaed_cli.stages.common.fitted_clips import frames_taken, latent_grid
from flashvaed_cli.stages.common.loading import Inputs
from flashvaed_cli.stages.distill.validation import validation_files

NUM_STATISTICS_CLIPS = 8
_MAX_WARNINGS = 10


@dataclass(frozen=True)
class ClipSource:
    """The files, how they are cut, and who encodes them.

    Attributes:
        key: what the clips depend on.
        num_workers: None to choose by the number of clips.
    """

    vae: Checkpoint
    device: torch.device
    paths: tuple[Path, ...]
    key: CacheKey
    latent_scale: LatentScale
    num_workers: int | None

    @classmethod
    def of(cls, recipe: DistillRecipe, inputs: Inputs, num_drawn: int | None) -> ClipSource:
        """What a recipe names; see `training_data` for `num_drawn`.

        Raises:
            MediaError: nothing found, or a bucket that the VAE does not take.
        """
        held_out = validation_files(recipe)
        paths = tuple(path for path in find_data(recipe.data) if path.resolve() not in held_out)
        if not paths:
            raise MediaError("every file of --data is validated on: give others to train on")
        num_clips = recipe.num_clips
        if recipe.cache_latents is None:
            if num_drawn is None:
                num_drawn = recipe.batch_size * sum(phase.num_steps for phase in recipe.schedule())
            num_clips = min(num_clips, max(num_drawn, NUM_STATISTICS_CLIPS))
        key = CacheKey(
            vae=inputs.original.sha256,
            files=tuple(stamp_file(path) for path in paths),
            latent_scale=recipe.latent_scale if any(map(is_latent_file, paths)) else None,
            cut=CutSettings(
                buckets=training_buckets(
                    recipe, latent_grid(inputs.original), still=inputs.checkpoint.require_decoder().spec.still
                ),
                exact=bool(recipe.buckets),
                num_clips=num_clips,
                max_side=recipe.max_side,
                seed=recipe.seed,
            ),
            dtype="float32" if recipe.cache_latents is None else recipe.cache_dtype,
        )
        return cls(inputs.original, inputs.device, paths, key, recipe.latent_scale, recipe.num_workers)

    def workers(self, num_clips: int) -> int:
        """How many processes to use for this many clips."""
        return default_num_workers(num_clips) if self.num_workers is None else min(self.num_workers, num_clips)

    def encode(
        self,
        progress: Progress,
        keep: Callable[[int, Float[Tensor, "C T Hz Wz"]], object],
        settings: CutSettings,
        done: frozenset[int] = frozenset(),
    ) -> dict[str, str]:
        """Encode the clips that are not done, handing each to `keep`; returns what had to be left out.

        Raises:
            MediaError: no file, or no clip, can be used.
        """
        with FileWorkers(self.workers(settings.num_clips), progress.warn) as workers:
            plan = self._plan(progress, workers, settings)
            skipped = {str(path): reason for path, reason in plan.skipped.items()}
            cuts = [cut for cut in plan.cuts if cut.number not in done]
            progress.log(f"{len(plan.cuts)} different clips of {len({cut.path for cut in plan.cuts})} files")
            lost: Counter[Path] = Counter()
            with progress.task("encoding clips", len(cuts)) as task:
                for cut, loaded in self._load(workers, cuts, settings.max_side):
                    if isinstance(loaded, str):  # damaged behind what measuring looks at
                        lost[cut.path] += 1
                        skipped[str(cut.path)] = f"{lost[cut.path]} of its clips: {loaded}"
                    else:
                        keep(cut.number, self._encode(loaded, cut.path))
                    task.advance()
        if not done and sum(lost.values()) == len(plan.cuts):
            raise none_usable(len(self.paths), {Path(path): reason for path, reason in skipped.items()})
        warn_of_skipped(progress, skipped)
        return skipped

    def _plan(self, progress: Progress, workers: FileWorkers, settings: CutSettings) -> CutPlan:
        order = file_order(self.paths, settings.seed)
        total = len(order) if len(order) <= settings.num_clips else None  # else it ends when there are enough
        measure = partial(measure_file, max_side=settings.max_side, latent_width=self.vae.latent_width)
        with progress.task("looking at files", total) as task:

            def measured() -> Iterator[tuple]:
                for path, size in workers.map(measure, order, str):
                    task.advance()
                    yield path, size

            return plan_cuts(measured(), settings, latent_grid(self.vae))

    def _load(
        self, workers: FileWorkers, cuts: list[ClipCut], max_side: int | None
    ) -> Iterator[tuple[ClipCut, np.ndarray | str]]:
        if any(not is_latent_file(cut.path) for cut in cuts):
            self.vae.require_encoder()
        load = partial(load_cuts, max_side=max_side, latent_width=self.vae.latent_width)
        for job, loaded in workers.map(load, decoding_jobs(cuts), lambda job: str(job[0].path)):
            yield from zip(job, loaded, strict=True)

    def _encode(self, loaded: np.ndarray, path: Path) -> Float[Tensor, "C T Hz Wz"]:
        """Pixels through the encoder, latents to the scale that decoders take; on the CPU."""
        if is_latent_file(path):
            return to_raw(torch.from_numpy(loaded)[None], scale_of(path, self.latent_scale), self.vae)[0]
        return encode_clip(self.vae, from_bytes(torch.from_numpy(loaded)), self.device)[0].cpu()


def training_buckets(recipe: DistillRecipe, grid: LatentGrid, *, still: bool = False) -> tuple[Bucket, ...]:
    """The recipe's buckets, or the one that `num_frames` (rounded down) and `crop_size` make.

    Args:
        still: for a decoder of single images: one frame, whatever `num_frames` says.
    Raises:
        MediaError: a bucket is not 1 + temporal_factor * n frames (for single images: 1), or a side is no multiple
            of the spatial factor.
    """
    if not recipe.buckets:
        num_frames = 1 if still else grid.whole_frames(recipe.num_frames)
        return (Bucket(num_frames, recipe.crop_size, recipe.crop_size),)
    if still and (longer := [bucket for bucket in recipe.buckets if bucket[0] != 1]):
        raise MediaError(
            f"A decoder of single images trains on single frames, not on {'x'.join(map(str, longer[0]))}: give the "
            f"bucket {'x'.join(map(str, (1, *longer[0][1:])))}."
        )
    for frames, height, width in recipe.buckets:
        near = (
            grid.whole_frames(frames),
            *(max(1, s // grid.spatial_factor) * grid.spatial_factor for s in (height, width)),
        )
        if near != (frames, height, width):
            raise MediaError(
                f"The bucket {frames}x{height}x{width} does not fit the VAE, which takes {frames_taken(grid)} and "
                f"sides that {grid.spatial_factor} divides: give {'x'.join(map(str, near))}, say."
            )
    return tuple(Bucket(*bucket) for bucket in dict.fromkeys(recipe.buckets))


def warn_of_skipped(progress: Progress, skipped: Mapping[str, str]) -> None:
    """Name what is left out, unless that is very much."""
    for path, reason in list(skipped.items())[:_MAX_WARNINGS]:
        progress.warn(f"skipped {path}: {reason}")
    if len(skipped) > _MAX_WARNINGS:
        progress.warn(f"skipped {len(skipped) - _MAX_WARNINGS} more files; the artifact names them all")
