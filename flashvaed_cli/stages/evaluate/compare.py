"""One clip through every decoder: figures, pictures and videos, in memory that does not grow with its length."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.run.runtime import DecodeRuntime
from flashvaed_cli.media.writer import VideoWriter
from flashvaed_cli.ownership import SOFTWARE
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.report.evaluation import ClipFigures
from flashvaed_cli.report.page.album import AlbumBuilder, ClipAlbum
from flashvaed_cli.report.pictures import save_strip, select_frames, side_by_side
from flashvaed_cli.stages.common.loading import Inputs
from flashvaed_cli.stages.evaluate.chunks import Chunk, open_clip
from flashvaed_cli.stages.evaluate.judge import ClipJudge, FeatureJudge, Frames, Metrics
from flashvaed_cli.stages.evaluate.page import ClipVideos

VIDEO, ORIGINAL = "video", "original"
SPEED_LATENT_FRAMES = 5
_NUM_STRIP_COLUMNS = 4


@dataclass(frozen=True)
class ClipToJudge:
    """A file, its name in reports, and the stem of its pictures."""

    path: Path
    shown: str
    stem: str


@dataclass(frozen=True)
class Comparison:
    """The results for one clip. `latents` are its first few, for timing the decoders."""

    rows: tuple[ClipFigures, ...]
    files: tuple[Path, ...]
    latents: Float[Tensor, "1 C T Hz Wz"]
    album: ClipAlbum


@torch.no_grad()
def compare_clip(
    clip: ClipToJudge,
    runtimes: Mapping[str, DecodeRuntime],
    inputs: Inputs,
    recipe: EvalRecipe,
    metrics: Metrics,
    features: FeatureJudge | None,
    output: Path,
    progress: Progress,
) -> Comparison:
    """Decode a clip with every decoder, the original first, and judge it.

    Args:
        features: also takes the frames.
        output: folder for its pictures.
    Raises:
        MediaError: the file is damaged.
    """
    chunks, num_frames, fps = open_clip(clip.path, inputs, recipe, progress)
    shown = set(select_frames(num_frames, _NUM_STRIP_COLUMNS))
    strips: dict[str, list[Frames]] = {}
    chunks, *copies = tee(chunks, 1 + len(runtimes))  # a decoder that sees frames ahead reads further than others
    num_latents = inputs.original.require_decoder().spec.num_latents(num_frames)
    streams = [
        runtime.iter_parts((chunk.latents for chunk in copy), num_latents=num_latents)
        for runtime, copy in zip(runtimes.values(), copies, strict=True)
    ]
    first: list[Tensor] = []
    students = [key for key in runtimes if key != ORIGINAL]
    album = AlbumBuilder(clip.shown, num_frames, video=VIDEO, original=ORIGINAL, students=students)
    done = 0
    mp4 = output / f"{clip.stem}.mp4" if recipe.video and num_frames > 1 else None
    factor = inputs.original.require_decoder().spec.temporal_factor
    with ExitStack() as stack, progress.task(f"eval {clip.stem}", num_frames) as task:
        writer = None if mp4 is None else stack.enter_context(VideoWriter(mp4, fps=fps, comment=f"{SOFTWARE} eval"))
        videos: ClipVideos | None = None
        judges = {key: ClipJudge(metrics, factor, stack, progress.warn) for key in runtimes}
        for chunk, *decoded in zip(chunks, *streams, strict=True):
            if sum(part.shape[2] for part in first) < SPEED_LATENT_FRAMES:
                first.append(chunk.latents)
            views = {} if chunk.frames is None else {VIDEO: chunk.frames}
            views |= {key: _as_seen(frames, chunk) for key, frames in zip(runtimes, decoded, strict=True)}
            for key, judge in judges.items():
                judge.update(views[key], views.get(VIDEO), views[ORIGINAL])
            if features is not None:
                features.update(views)
            pictured = [label for label in views if label in (VIDEO, *list(runtimes)[:2])]
            if writer is not None:
                writer.write(side_by_side([(label, views[label]) for label in pictured]))
            for label in pictured:
                frames = views[label]
                picked = [i for i in range(frames.shape[1]) if done + i in shown]
                strips.setdefault(label, []).append(frames[:, picked])
            album.update(views)
            if writer is not None:
                videos = videos or stack.enter_context(ClipVideos(fps, *views[ORIGINAL].shape[-2:]))
                videos.write(views)
            done += chunk.num_frames
            task.advance(chunk.num_frames)
        pictures = album.finish(None if videos is None else videos.finish())
        height, width = strips[ORIGINAL][0].shape[-2:]
        rows = tuple(
            ClipFigures(
                clip=clip.shown,
                decoder=key,
                num_frames=done,
                height=height,
                width=width,
                to_ground_truth=judge.to_video(),
                to_original=judge.to_original(),
            )
            for key, judge in judges.items()
        )
    if features is not None:
        features.end_clip()
    files = [] if mp4 is None else [mp4]
    if len(strips) > 1:  # an original alone, on latents, is compared with nothing
        labelled = [(label, torch.cat(parts, dim=1)) for label, parts in strips.items()]
        files.insert(0, save_strip(output / f"{clip.stem}.png", labelled, frame_numbers=sorted(shown)))
    latents = torch.cat(first, dim=2)[:, :, :SPEED_LATENT_FRAMES]
    return Comparison(rows, tuple(files), latents, pictures)


def _as_seen(decoded: Float[Tensor, "1 3 F H W"], chunk: Chunk) -> Frames:
    """Frames of a chunk as they are shown and judged, without the padding of the clip."""
    frames = decoded[0, :, : chunk.num_frames].float().cpu()
    if chunk.frames is not None:  # undo the padding of the sides
        frames = frames[..., : chunk.frames.shape[-2], : chunk.frames.shape[-1]]
    return frames
