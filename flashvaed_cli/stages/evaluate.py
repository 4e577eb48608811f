"""`flashvaed eval`: the original decoder and derived ones on the same latents, side by side.

Videos are read, encoded, decoded by both and compared chunk by chunk, so memory does not grow with their length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import tee
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.cost import total_gflop
from flashvaed_cli.decoders.exact import exact_decoder
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.half_range import cast_decoder
from flashvaed_cli.decoders.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.streaming import State, encode_step
from flashvaed_cli.errors import MediaError, MetricUnavailableError
from flashvaed_cli.media.clips import usable_files
from flashvaed_cli.media.cuts import none_usable
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.media.video import count_frames, iter_frames, probe_video
from flashvaed_cli.media.writer import VideoWriter
from flashvaed_cli.metrics.lpips_metric import LpipsMetric, load_lpips, lpips_checkpoint_path
from flashvaed_cli.metrics.quality import QualityAccumulator, QualityResult, mean_quality
from flashvaed_cli.metrics.speed import SpeedResult, speed_ratio, synchronizer, time_alternating
from flashvaed_cli.ownership import SOFTWARE
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.recipe.quantities import parse_memory
from flashvaed_cli.report.evaluation import (
    REPORT_JSON,
    ClipFigures,
    DecoderFigures,
    EvaluationReport,
    Spread,
    save_report,
    summary_table,
)
from flashvaed_cli.report.page.album import AlbumBuilder, ClipAlbum
from flashvaed_cli.report.page.page import PAGE, render_page
from flashvaed_cli.report.pictures import save_strip, select_frames, side_by_side
from flashvaed_cli.report.speed import SPEED_JSON
from flashvaed_cli.stages.clips import find_data, raw_latents
from flashvaed_cli.stages.compared import derived_decoders, distinct_names
from flashvaed_cli.stages.fitted_clips import latent_grid, whole_side
from flashvaed_cli.stages.loading import DTYPES, Inputs, choose_device, choose_input, input_settings, load_inputs
from flashvaed_cli.stages.outputs import claim_folder, filled_at_the_end, moved, refuse_to_replace
from flashvaed_cli.stages.report_page import ClipVideos, page_extras
from flashvaed_cli.stages.result import StageOutcome
from flashvaed_cli.zoo.builtin import JUDGED_CLIP

VIDEO, ORIGINAL, ORIGINAL_TUNED = "video", "original", "original, exact"
_DEFAULT_CHUNK = 4
_NUM_STRIP_COLUMNS = 4
_SPEED_LATENT_FRAMES = 5

Frames = Float[Tensor, "3 T H W"]


def run_evaluate(recipe: EvalRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Compare both decoders on every clip, time them in alternation, write report and pictures.

    Raises:
        ArtifactError: decoder or original cannot be loaded.
        MediaError: no readable clip (a damaged one is skipped and named in the notes), or sides that hold no latent.
        MetricUnavailableError: `lpips: on` without the backbone's weights.
        FlashVaedError: the output folder holds files of something else.
    """
    output = claim_folder(recipe.output, REPORT_JSON, SPEED_JSON, force=force)
    location = choose_input(recipe.input, EvalRecipe, progress)
    device = choose_device(recipe.device)
    inputs = load_inputs(location, **input_settings(recipe), device=device, progress=progress)
    if recipe.max_side is not None:
        whole_side("max_side", recipe.max_side, latent_grid(inputs.original))  # refuses what holds no latent
    notes: list[str] = []
    lpips = _lpips(recipe, device, notes)
    decoders = _decoders(inputs, recipe)
    if any(decoder.spec.still for decoder in decoders.values()) and recipe.num_frames != 1:
        recipe = recipe.model_copy(update={"num_frames": 1})
        notes.append("Of every clip the first frame is judged: there is a decoder of single images among them.")
    runtimes = {name: _runtime(name, decoder, recipe) for name, decoder in decoders.items()}
    found = find_data(recipe.data, default=(JUDGED_CLIP,))
    files, broken = usable_files(found, recipe.num_clips, latent_width=inputs.original.latent_width)
    for path, reason in broken.items():
        _note_skipped(path, reason, notes, progress)
    names = distinct_names(files)
    reads = (location, recipe.original, *recipe.compare, *files)
    refuse_to_replace((output / f"{name}{suffix}" for name in names for suffix in (".png", ".mp4")), reads)
    with filled_at_the_end(output, REPORT_JSON, reads, force=force) as draft:
        comparisons = []
        for path, name in zip(files, names, strict=True):
            try:
                comparisons.append(_compare_clip(path, name, runtimes, inputs, recipe, lpips, draft, progress))
            except MediaError as error:  # damaged where only decoding shows it
                broken[path] = str(error)
                _note_skipped(path, str(error), notes, progress)
                for suffix in (".png", ".mp4"):
                    (draft / f"{name}{suffix}").unlink(missing_ok=True)
        if not comparisons:
            raise none_usable(len(broken), broken)
        notes += _notes_on_colours(path for path in files if path not in broken)
        figures = [_figures(name, decoder, comparisons) for name, decoder in decoders.items()]
        figures = _timed(figures, runtimes, decoders[ORIGINAL], comparisons[0].latents, recipe, device, progress)
        pictures = tuple(path for comparison in comparisons for path in comparison.files)
        report = EvaluationReport(
            decoders=tuple(figures),
            clips=tuple(row for comparison in comparisons for row in comparison.rows),
            settings=_settings(recipe, inputs, comparisons[0].latents, command_line),
            notes=tuple(notes),
            files={path.name: path.name for path in pictures},
        )
        written = save_report(report, draft)
        page = draft / PAGE
        albums = [comparison.album for comparison in comparisons]
        page.write_text(
            render_page(report, page_extras(inputs.checkpoint, albums, command_line)),
            encoding="utf-8",
            errors="backslashreplace",
        )
    paths = moved((page, written["markdown"], written["json"], *pictures), output)
    return StageOutcome(paths, (summary_table(report),), {"report": str(output / REPORT_JSON)}, tuple(notes))


def _note_skipped(path: Path, reason: str, notes: list[str], progress: Progress) -> None:
    progress.warn(f"skipped {path}: {reason}")
    notes.append(f"skipped {path.name}: {reason}")


def _notes_on_colours(paths: Iterable[Path]) -> list[str]:
    """Which clips are judged in other colours than they are stored in."""
    videos = [path for path in paths if not is_latent_file(path)]
    return [f"{path.name}: {how}." for path in videos if (how := probe_video(path).tone_mapping)]


def _settings(recipe: EvalRecipe, inputs: Inputs, timed: Tensor, command_line: str) -> dict[str, str | int | float]:
    """How it was measured, as the report shows it. `timed`: the latents of the timing."""
    device = inputs.device.type
    return {
        "command": command_line,
        "decoder": inputs.checkpoint.location,
        "sha256": inputs.checkpoint.sha256,
        "original": inputs.original.location,
        "device": f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device,
        "dtype": recipe.dtype,
        "speed": f"{recipe.num_speed_rounds} rounds in alternation, latents {list(timed.shape)}",
    }


def _lpips(recipe: EvalRecipe, device: torch.device, notes: list[str]) -> LpipsMetric | None:
    if recipe.lpips == "off":
        return None
    try:
        return load_lpips("alex", device, allow_download=recipe.allow_download)
    except MetricUnavailableError as error:
        if recipe.lpips == "on":
            raise
        is_absent = not recipe.allow_download and not lpips_checkpoint_path("alex").is_file()
        short = "LPIPS is left out: its backbone's weights are not here (--allow-download gets them, 233 MB)."
        notes.append(short if is_absent else f"LPIPS is left out. {error}")
        return None


def _decoders(inputs: Inputs, recipe: EvalRecipe) -> dict[str, Decoder]:
    """The original first; then the derived ones by file name, with exact operators.

    Raises:
        ArtifactError: a decoder to compare with cannot be loaded, or is of another original.
    """
    dtype = DTYPES[recipe.dtype]
    derived = derived_decoders(inputs, recipe, taken=(VIDEO, ORIGINAL, ORIGINAL_TUNED))
    tuned = {name: cast_decoder(exact_decoder(decoder), dtype) for name, decoder in derived.items()}
    return {ORIGINAL: cast_decoder(inputs.original.require_decoder(), dtype), **tuned}


def _runtime(name: str, decoder: Decoder, recipe: EvalRecipe) -> DecodeRuntime:
    """How a decoder runs: within the recipe's limits, and the original as plain torch would."""
    settings = DecodeSettings(
        chunk=recipe.chunk,
        tile=recipe.tile,
        memory_format="contiguous" if name == ORIGINAL else "channels-last",
        max_memory_bytes=None if recipe.max_memory is None else parse_memory(recipe.max_memory),
    )
    return DecodeRuntime(decoder, settings)


@dataclass(frozen=True)
class _Chunk:
    """Frames (none for a latent file) and their raw latents; `frames` are not padded."""

    frames: Frames | None
    latents: Float[Tensor, "1 C T Hz Wz"]
    num_frames: int


@dataclass(frozen=True)
class _Comparison:
    """What one clip gave. `latents` are its first few, to time the decoders on."""

    rows: tuple[ClipFigures, ...]
    files: tuple[Path, ...]
    latents: Float[Tensor, "1 C T Hz Wz"]
    album: ClipAlbum


@torch.no_grad()
def _compare_clip(
    path: Path,
    name: str,
    runtimes: dict[str, DecodeRuntime],
    inputs: Inputs,
    recipe: EvalRecipe,
    lpips: LpipsMetric | None,
    output: Path,
    progress: Progress,
) -> _Comparison:
    chunks, num_frames, fps = _open_clip(path, inputs, recipe, progress)
    shown = set(select_frames(num_frames, _NUM_STRIP_COLUMNS))
    strips: dict[str, list[Frames]] = {}
    quality = {key: _Judge(lpips) for key in runtimes}
    chunks, *copies = tee(chunks, 1 + len(runtimes))  # a decoder that sees frames ahead reads further than others
    streams = [
        runtime.iter_parts(chunk.latents for chunk in copy)
        for runtime, copy in zip(runtimes.values(), copies, strict=True)
    ]
    first: list[Tensor] = []
    students = [key for key in runtimes if key != ORIGINAL]
    album = AlbumBuilder(path.name, num_frames, video=VIDEO, original=ORIGINAL, students=students)
    done = 0
    mp4 = output / f"{name}.mp4" if recipe.video and num_frames > 1 else None
    with ExitStack() as stack, progress.task(f"eval {name}", num_frames) as task:
        writer = None if mp4 is None else stack.enter_context(VideoWriter(mp4, fps=fps, comment=f"{SOFTWARE} eval"))
        videos: ClipVideos | None = None
        for chunk, *decoded in zip(chunks, *streams, strict=True):
            if sum(part.shape[2] for part in first) < _SPEED_LATENT_FRAMES:
                first.append(chunk.latents)
            views = {} if chunk.frames is None else {VIDEO: chunk.frames}
            views |= {key: _as_seen(frames, chunk) for key, frames in zip(runtimes, decoded, strict=True)}
            for key, judge in quality.items():
                judge.update(views[key], views.get(VIDEO), views[ORIGINAL])
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
    files = [] if mp4 is None else [mp4]
    if len(strips) > 1:  # an original alone on latents has nothing beside it
        labelled = [(label, torch.cat(parts, dim=1)) for label, parts in strips.items()]
        files.insert(0, save_strip(output / f"{name}.png", labelled, frame_numbers=sorted(shown)))
    height, width = strips[ORIGINAL][0].shape[-2:]
    rows = tuple(
        ClipFigures(
            clip=path.name,
            decoder=key,
            num_frames=done,
            height=height,
            width=width,
            to_ground_truth=judge.to_video(),
            to_original=None if key == ORIGINAL else judge.to_original(),
        )
        for key, judge in quality.items()
    )
    latents = torch.cat(first, dim=2)[:, :, :_SPEED_LATENT_FRAMES]
    return _Comparison(rows, tuple(files), latents, pictures)


class _Judge:
    """Quality of one decoder on one clip, against the video and against the original's output."""

    def __init__(self, lpips: LpipsMetric | None) -> None:
        min_side = 0 if lpips is None else lpips.min_side
        self._to_video = QualityAccumulator(lpips=lpips, lpips_min_side=min_side)
        self._to_original = QualityAccumulator(lpips=lpips, lpips_min_side=min_side)
        self._has_video = False

    def update(self, frames: Frames, video: Frames | None, original: Frames) -> None:
        if video is not None:
            self._has_video = True
            self._to_video.update(frames, video)
        if frames is not original:
            self._to_original.update(frames, original)

    def to_video(self) -> QualityResult | None:
        return self._to_video.result() if self._has_video else None

    def to_original(self) -> QualityResult:
        return self._to_original.result()


def _as_seen(decoded: Float[Tensor, "1 3 F H W"], chunk: _Chunk) -> Frames:
    """Frames of a chunk as they are shown and judged, without the padding of the clip."""
    frames = decoded[0, :, : chunk.num_frames].float().cpu()
    if chunk.frames is not None:  # undo the padding of the sides
        frames = frames[..., : chunk.frames.shape[-2], : chunk.frames.shape[-1]]
    return frames


def _open_clip(
    path: Path, inputs: Inputs, recipe: EvalRecipe, progress: Progress
) -> tuple[Iterator[_Chunk], int, Fraction]:
    """The chunks of a video or latent file, its number of frames, and frames per second."""
    original = inputs.original
    spec = original.require_decoder().spec
    chunk = recipe.chunk or _DEFAULT_CHUNK
    if is_latent_file(path):
        latents = raw_latents(path, recipe.latent_scale, original)
        if len(latents) > 1:
            progress.warn(f"{path} holds {len(latents)} clips: only the first is judged")
        longest = latents.shape[2] if recipe.num_frames is None else spec.num_latents(recipe.num_frames)
        latents = latents[:1, :, :longest].to(inputs.device)
        num_frames = 1 + spec.temporal_factor * (latents.shape[2] - 1)
        num_frames = min(num_frames, recipe.num_frames or num_frames)
        return (
            _latent_chunks(latents, num_frames, chunk, spec.temporal_factor),
            num_frames,
            Fraction(get_family(original.family).frames_per_second),
        )
    num_frames = count_frames(path)
    num_frames = min(num_frames, recipe.num_frames or num_frames)
    return _video_chunks(path, num_frames, chunk, inputs, recipe), num_frames, probe_video(path).fps


def _latent_chunks(latents: Float[Tensor, "1 C T Hz Wz"], num_frames: int, chunk: int, factor: int) -> Iterator[_Chunk]:
    """Chunks of latents; of the last one, only the frames up to `num_frames` count."""
    done = 0
    for start in range(0, latents.shape[2], chunk):
        part = latents[:, :, start : start + chunk]
        count = min(factor * part.shape[2] - (factor - 1 if start == 0 else 0), num_frames - done)
        yield _Chunk(None, part, count)
        done += count


def _video_chunks(path: Path, num_frames: int, chunk: int, inputs: Inputs, recipe: EvalRecipe) -> Iterator[_Chunk]:
    """Frames cut on latent borders, the last chunk filled up by repeating its last frame, and encoded.

    An encoder that sees frames ahead takes the whole clip as one chunk.
    """
    encoder = inputs.original.require_encoder()
    factor, multiple = encoder.spec.temporal_factor, encoder.spec.spatial_factor
    chunk = chunk if encoder.spec.is_causal else encoder.spec.num_latents(num_frames)
    frames = iter_frames(path, start=0, stop=num_frames, max_side=recipe.max_side)
    past: State | None = None
    done = 0
    while True:
        wanted = 1 + factor * (chunk - 1) if past is None else factor * chunk
        read = [frame for _, frame in zip(range(wanted), frames, strict=False)]
        if not read:
            if done < num_frames:
                raise MediaError(
                    f"{path} gives {done} frames instead of {num_frames}: frames are lost. Download or export it again."
                )
            return
        done += len(read)
        clip = torch.stack(read, dim=1).float() / 127.5 - 1.0  # [3, T, H, W]
        pixels = _fill_up(clip, factor, multiple, is_first=past is None)[None].to(inputs.device)
        latents, past = encode_step(encoder, pixels, past)
        yield _Chunk(clip, latents, clip.shape[1])


def _fill_up(clip: Frames, factor: int, multiple: int, *, is_first: bool) -> Frames:
    """Repeat the last frame, row and column up to what the encoder takes in a first or later chunk."""
    _, t, h, w = clip.shape
    missing = -(t - 1 if is_first else t) % factor
    for axis, count in ((1, missing), (2, -h % multiple), (3, -w % multiple)):
        if count:
            last = clip.narrow(axis, clip.shape[axis] - 1, 1)
            clip = torch.cat([clip, last.expand(*[count if i == axis else -1 for i in range(4)])], dim=axis)
    return clip


def _figures(name: str, decoder: Decoder, comparisons: list[_Comparison]) -> DecoderFigures:
    rows = [row for comparison in comparisons for row in comparison.rows if row.decoder == name]
    to_video = [row.to_ground_truth for row in rows if isinstance(row.to_ground_truth, QualityResult)]
    to_original = [row.to_original for row in rows if isinstance(row.to_original, QualityResult)]
    latents = comparisons[0].latents
    num_frames = 1 + decoder.spec.temporal_factor * (latents.shape[2] - 1)
    return DecoderFigures(
        name=name,
        to_ground_truth=mean_quality(to_video) if to_video else None,
        to_original=mean_quality(to_original) if to_original else None,
        num_parameters=decoder.parameter_count,
        file_bytes=decoder.parameter_count * torch.float32.itemsize,
        gflops=total_gflop(decoder.spec, (latents.shape[2], latents.shape[3], latents.shape[4])) / num_frames,
    )


@torch.no_grad()
def _timed(
    figures: list[DecoderFigures],
    runtimes: dict[str, DecodeRuntime],
    original: Decoder,
    latents: Float[Tensor, "1 C T Hz Wz"],
    recipe: EvalRecipe,
    device: torch.device,
    progress: Progress,
) -> list[DecoderFigures]:
    """Frames per second of every decoder, and of the original with the exact operators that the derived ones run."""
    latents = latents.to(DTYPES[recipe.dtype])
    timed = dict(runtimes)
    if len(timed) > 1:
        timed[ORIGINAL_TUNED] = _runtime(ORIGINAL_TUNED, exact_decoder(original), recipe)
        figures = [figures[0], DecoderFigures(name=ORIGINAL_TUNED), *figures[1:]]
    candidates = {name: partial(runtime.decode, latents) for name, runtime in timed.items()}
    speeds = time_alternating(
        candidates, num_rounds=recipe.num_speed_rounds, synchronize=synchronizer(device), progress=progress
    )
    num_frames = 1 + original.spec.temporal_factor * (latents.shape[2] - 1)
    return [_with_speed(one, speeds, num_frames) for one in figures]


def _with_speed(figures: DecoderFigures, speeds: dict[str, SpeedResult], num_frames: int) -> DecoderFigures:
    speed = speeds[figures.name]
    ratio = speed_ratio(speeds[ORIGINAL], speed)
    spread = None if figures.name == ORIGINAL else Spread(ratio.median, ratio.min, ratio.max)
    return replace(figures, frames_per_second=speed.per_second(num_frames), speedup=spread)
