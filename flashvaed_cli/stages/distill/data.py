"""What distillation trains on: latents of clips cut from videos, or from latent files, in memory or from a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cache_key import CacheKey
from flashvaed_cli.media.cuts import ClipSize, CutSettings
from flashvaed_cli.media.latent_cache import (
    CachedLatents,
    CacheWriter,
    claim_cache,
    drop_shards,
    is_intact,
    read_cache,
    read_key,
    sole_writer,
)
from flashvaed_cli.paths import user_path
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.stages.common.fitted_clips import latent_grid
from flashvaed_cli.stages.common.loading import Inputs
from flashvaed_cli.stages.distill.clip_source import ClipSource, warn_of_skipped

_STEP_STRIDE = 1_000_003  # a prime: steps of runs with neighbouring seeds do not share random numbers

Draw = Callable[[int], tuple[Tensor, ...]]
"""Step number to this process's micro-batches `[B, C, T, Hz, Wz]`."""


class Latents(Protocol):
    """Encoded clips by number, to cut parts from."""

    @property
    def sizes(self) -> Mapping[int, ClipSize]:
        """Size of every clip by its number, in ascending order."""
        ...

    def cut(self, number: int, size: ClipSize, top: int = 0, left: int = 0) -> Float[Tensor, "C T Hz Wz"]:
        """A prefix in time and a rectangle in space of one clip."""
        ...


@dataclass(frozen=True)
class LatentPool:
    """Encoded clips in memory."""

    clips: dict[int, Float[Tensor, "C T Hz Wz"]]
    sizes: dict[int, ClipSize] = field(init=False)

    def __post_init__(self) -> None:
        sizes = {number: ClipSize(*self.clips[number].shape[1:]) for number in sorted(self.clips)}
        object.__setattr__(self, "sizes", sizes)

    def cut(self, number: int, size: ClipSize, top: int = 0, left: int = 0) -> Float[Tensor, "C T Hz Wz"]:
        """See `Latents`."""
        return self.clips[number][:, : size.num_frames, top : top + size.height, left : left + size.width]


@dataclass(frozen=True)
class TrainingData:
    """Encoded clips, grouped by the size that a step cuts from them.

    Attributes:
        groups: size on the latent grid to the numbers of the clips that have (at least) that size.
        key: identifies the content, wherever it is stored: equal keys draw equal batches.
        files: the files that the clips were to be cut from.
        skipped: files and clips that were left out, with the reason.
    """

    latents: Latents
    groups: dict[ClipSize, tuple[int, ...]]
    key: str
    files: tuple[Path, ...]
    skipped: dict[str, str]
    num_encoded: int
    num_workers: int
    cache: Path | None
    device: torch.device

    def draw(
        self, *, batch_size: int, num_micro_batches: int = 1, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> Draw:
        """Step number to this process's micro-batches: a function of step and seed only, so it needs no state.

        All clips of a step, over all processes, are of one size, which is drawn in proportion to the clips that
        have it. They are the same clips however the step is split into batches, micro-batches and processes.

        Args:
            batch_size: clips per micro-batch.
            rank, num_ranks: number of this process, and of all.
        """
        num_clips = batch_size * num_micro_batches * num_ranks
        sizes = list(self.groups)
        weights = torch.tensor([float(len(group)) for group in self.groups.values()])

        def draw_step(step: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(seed * _STEP_STRIDE + step)
            size = sizes[int(torch.multinomial(weights, 1, generator=generator))]
            numbers = self.groups[size]
            picks = _pick(len(numbers), num_clips, generator)
            places = torch.rand(num_clips, 2, generator=generator, dtype=torch.float64).tolist()
            batches = []
            for micro_batch in range(num_micro_batches):
                first = (micro_batch * num_ranks + rank) * batch_size
                clips = [self._cut_at(numbers[picks[i]], size, *places[i]) for i in range(first, first + batch_size)]
                batches.append(torch.stack(clips))  # [B, C, T, Hz, Wz]
            return tuple(batches)

        return draw_step

    def first(self, count: int) -> list[Float[Tensor, "1 C T Hz Wz"]]:
        """Up to `count` clips on the device of the models, for statistics."""
        numbered = [(number, size) for size, numbers in self.groups.items() for number in numbers]
        return [self.latents.cut(number, size)[None].to(self.device) for number, size in numbered[:count]]

    def record(self) -> dict[str, Any]:
        """The record of the data for the artifact."""
        return {
            "num_clips": len({number for group in self.groups.values() for number in group}),
            "num_clips_by_latent_size": {str(size): len(group) for size, group in self.groups.items()},
            "num_encoded": self.num_encoded,
            "num_workers": self.num_workers,
            "cache": None if self.cache is None else str(self.cache),
            "num_skipped": len(self.skipped),
            "skipped": self.skipped,
        }

    def _cut_at(self, number: int, size: ClipSize, down: float, right: float) -> Float[Tensor, "C T Hz Wz"]:
        """The rectangle at this fraction of the available room; a clip always begins with its first latent."""
        stored = self.latents.sizes[number]
        top, left = int(down * (stored.height - size.height + 1)), int(right * (stored.width - size.width + 1))
        return self.latents.cut(number, size, top, left)


def training_data(
    recipe: DistillRecipe,
    inputs: Inputs,
    progress: Progress,
    *,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
    num_drawn: int | None = None,
) -> TrainingData:
    """Encode the recipe's clips, or open the cache that holds them.

    Args:
        is_main: with a cache, this process writes it; the others open it when `wait` returns. Without one,
            every process encodes all clips.
        wait: returns when all processes have called it; the main one does so when the cache is complete.
        num_drawn: the most clips that all steps of all processes take; without a cache, no more are encoded.
    Raises:
        MediaError: nothing found, nothing usable, or the cache holds other data.
        ArtifactError: videos are to be encoded, and there is no encoder.
    """
    source = ClipSource.of(recipe, inputs, num_drawn)
    if recipe.cache_latents is None:
        clips: dict[int, Tensor] = {}
        skipped = source.encode(progress, clips.__setitem__, source.key.cut)
        return _collect(LatentPool(clips), skipped, source, recipe, num_encoded=len(clips), stored=source.key)
    folder = user_path(recipe.cache_latents)
    num_encoded = 0
    if is_main:
        try:
            num_encoded = _complete_cache(folder, source, progress)
        except Exception:
            wait()  # or the other processes would wait for this one forever
            raise
    wait()
    stored = read_key(folder)
    cached = None if stored is None else read_cache(folder, stored, progress.warn)
    if stored is None or cached is None:
        raise MediaError(f"{folder} holds no complete latent cache: every machine must see the same folder.")
    return _collect(cached, cached.skipped, source, recipe, num_encoded=num_encoded, stored=stored)


def _complete_cache(folder: Path, source: ClipSource, progress: Progress) -> int:
    """Encode the clips that the cache lacks; returns their number."""
    stored = claim_cache(folder, source.key)
    cached = read_cache(folder, stored, progress.warn)
    if cached is not None and not _drop_damaged(cached, progress):
        progress.log(f"latents from the cache {folder}: {len(cached.sizes)} clips")
        warn_of_skipped(progress, cached.skipped)
        return 0
    with sole_writer(folder), CacheWriter(folder, stored, progress.warn) as writer:
        there = frozenset(writer.numbers)
        if there:
            progress.log(f"completing the cache {folder}, which holds {len(there)} clips")
        skipped = source.encode(progress, writer.add, stored.cut, there)
        return len(writer.finish(skipped).sizes) - len(there)


def _drop_damaged(cached: CachedLatents, progress: Progress) -> bool:
    """Remove damaged shards from a cache; returns whether there were any."""
    damaged = []
    with progress.task("checking the cache", len(cached.shards)) as task:
        for shard in cached.shards:
            if not is_intact(cached.folder, shard):
                damaged.append(shard)
            task.advance()
    for shard in damaged:
        progress.warn(f"{cached.folder / shard.name} is damaged: its {len(shard.clips)} clips are encoded again")
    if damaged:
        drop_shards(cached.folder, damaged)
    return bool(damaged)


def _collect(
    latents: Latents,
    skipped: dict[str, str],
    source: ClipSource,
    recipe: DistillRecipe,
    *,
    num_encoded: int,
    stored: CacheKey,
) -> TrainingData:
    """Group the clips by the sizes that the source's buckets cut from them.

    Raises:
        MediaError: no clip fills a bucket.
    """
    wanted, grid = source.key.cut, latent_grid(source.vae)
    groups: dict[ClipSize, list[int]] = {}
    sizes = {number: size for number, size in latents.sizes.items() if number < wanted.num_clips}
    for bucket in map(grid.shrink, wanted.buckets):
        for number, size in sizes.items():
            if not wanted.exact or bucket.fills(size):
                groups.setdefault(bucket.cut(size), []).append(number)
    if not groups:
        listed = ", ".join(str(bucket) for bucket in wanted.buckets)
        raise MediaError(f"None of the {len(sizes)} clips is large enough for a bucket ({listed}). Give smaller ones.")
    return TrainingData(
        latents,
        {size: tuple(numbers) for size, numbers in groups.items()},
        key=_content_key(stored, wanted, sizes),
        files=tuple(path for path in source.paths if str(path) not in skipped),
        skipped=skipped,
        num_encoded=num_encoded,
        num_workers=source.workers(wanted.num_clips) if num_encoded else 0,
        cache=None if recipe.cache_latents is None else Path(recipe.cache_latents),
        device=source.device,
    )


def _content_key(stored: CacheKey, wanted: CutSettings, sizes: Mapping[int, ClipSize]) -> str:
    """A key without folders and file times, so that an interrupted run can go on with a copy of its data."""
    content = [
        stored.vae,
        [(Path(stamp.path).name, stamp.num_bytes) for stamp in stored.files],
        stored.latent_scale,
        stored.dtype,
        asdict(stored.cut) | {"num_clips": None},
        asdict(wanted),
        [(number, *asdict(size).values()) for number, size in sizes.items()],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _pick(num_choices: int, num_picks: int, generator: torch.Generator) -> list[int]:
    """Draw numbers, without repeats if there are enough."""
    if num_picks <= num_choices:
        return torch.randperm(num_choices, generator=generator)[:num_picks].tolist()
    return torch.randint(num_choices, (num_picks,), generator=generator).tolist()
