"""`flashvaed decode`: latents to videos, pictures, arrays or raw frames, each frame written as it is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from io import BufferedIOBase
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import DecodeError, FlashVaedError, MediaError, is_out_of_memory
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.media.latent_files import is_latent_file, load_latents
from flashvaed_cli.media.sources import find_clips
from flashvaed_cli.paths import user_path
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.decode import DecodeRecipe
from flashvaed_cli.recipe.fields import LatentScale
from flashvaed_cli.recipe.quantities import parse_frame_rate
from flashvaed_cli.report.tables import Cell, Column, TableData
from flashvaed_cli.stages.common.clips import scale_of
from flashvaed_cli.stages.common.loading import choose_device, choose_input, load_input
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.decode.player import Player
from flashvaed_cli.stages.decode.targets import Clip, DecodeTarget, claim_targets, plan_targets


@dataclass
class _Tally:
    """The clips so far: decoded, or failed (with the reason)."""

    decoded: list[dict[str, Cell]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, name: str, error: FlashVaedError, progress: Progress) -> None:
        """Note a clip that cannot be decoded, and go on with the others."""
        progress.warn(f"{name} is left out: {error}")
        self.failed.append({"latents": name, "reason": str(error)})


@dataclass
class _Written:
    """What a target has of its clip: frames, their height and width."""

    num_frames: int = 0
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Output:
    """Settings for writing videos."""

    fps: Fraction
    crf: int
    stdout: BufferedIOBase | None
    reads: tuple[str, ...]
    force: bool


def run_decode(
    recipe: DecodeRecipe, *, progress: Progress, force: bool, command_line: str, stdout: BufferedIOBase | None = None
) -> StageOutcome:
    """Decode every clip of the latents; if one fails the others go on, and `failed` in the figures says why.

    Args:
        stdout: where `--output -` writes raw frames; a reader that closes it early is no error.
    Raises:
        ArtifactError: the decoder cannot be loaded, or has no statistics and the latents are normalized.
        MediaError: no latents found, or none that can be read.
        DecodeError: no plan fits the memory, `--compile` finds no compiler, or no clip could be decoded.
        FlashVaedError: an output is in the way or cannot be written.
    """
    location = choose_input(recipe.decoder, DecodeRecipe, progress)
    device = choose_device(recipe.device)
    checkpoint = load_input(location, recipe.family, progress, weights=recipe.weights)
    player = Player(checkpoint, recipe, device)
    tally = _Tally()
    files = _latent_files(recipe)
    clips = _clips(files, checkpoint, recipe.latent_scale, tally, progress)
    targets = plan_targets(clips, recipe)
    reads = (location, *map(str, files))
    claim_targets(targets, reads, force=force)
    fps = Fraction(get_family(checkpoint.family).frames_per_second)
    output = _Output(parse_frame_rate(recipe.fps) if recipe.fps else fps, recipe.crf, stdout, reads, force)
    for target in targets:
        _decode(target, player, output, tally, progress, is_only=len(files) == len(targets) == 1)
    if not tally.decoded:
        raise DecodeError("\n".join(["nothing was decoded:", *(one["reason"] for one in tally.failed)]))
    figures = {
        "command": command_line,
        "decoder": location,
        "sha256": checkpoint.sha256,
        "dtype": recipe.dtype,
        "device": device.type,
        "videos": tally.decoded,
        "failed": tally.failed,
    }
    notes = (*_scale_notes(clips), *_clip_notes(recipe, player.spec), *tally.notes)
    return StageOutcome(tuple(tally.paths), (_table(tally.decoded, location),), figures, notes)


def _latent_files(recipe: DecodeRecipe) -> list[Path]:
    """The latent files that are given, and those in the folders given.

    Raises:
        MediaError: there are none, or a video or picture is given.
    """
    files: dict[Path, None] = {}
    for name in recipe.latents:
        found = find_clips([name])
        latents = [path for path in found if is_latent_file(path)]
        if not latents:
            what = "holds no latents" if user_path(name).is_dir() else "holds frames, not latents"
            raise MediaError(f"{name} {what}: `decode` takes latent files. `flashvaed eval` takes videos too.")
        files.update(dict.fromkeys(latents))
    return list(files)


def _clips(
    files: Sequence[Path], checkpoint: Checkpoint, scale: LatentScale, tally: _Tally, progress: Progress
) -> list[Clip]:
    """The clips in the files; an unreadable file is an error only if there is no other.

    Raises:
        ArtifactError: some latents are normalized, and the checkpoint has no statistics.
        MediaError: none can be read.
    """
    if any(scale_of(path, scale) == "normalized" for path in files):
        checkpoint.require_statistics()
    spec = checkpoint.require_decoder().spec
    clips: list[Clip] = []
    for path in files:
        try:
            batch, _, num_latents, *_ = load_latents(path, latent_width=checkpoint.latent_width).shape
        except FlashVaedError as error:
            if len(files) == 1:
                raise
            tally.fail(path.name, error, progress)
            continue
        num_frames = spec.num_frames(num_latents)
        clips += [Clip(path, index, batch, num_frames, scale_of(path, scale)) for index in range(batch)]
    if not clips:
        raise MediaError("\n".join(["no latents can be read:", *(one["reason"] for one in tally.failed)]))
    return clips


def _decode(
    target: DecodeTarget, player: Player, output: _Output, tally: _Tally, progress: Progress, *, is_only: bool
) -> None:
    clip, written, start = target.clip, _Written(), time.perf_counter()
    try:
        latents = load_latents(clip.path, latent_width=player.latent_width)[clip.index : clip.index + 1]
        player.warn_of_slow_format(latents, progress)
        start = time.perf_counter()  # what comes before is no decoding
        while not _is_written(written, latents, target, player, output, progress):
            smaller = player.step_down(latents)
            tally.notes.append(f"out of memory: {clip.shown} was decoded with {smaller}")
            progress.warn(f"out of memory: decoding {clip.shown} again with {smaller}")
    except BrokenPipeError:
        shown = f"{written.num_frames} of {clip.num_frames} frames"
        tally.notes.append(f"the reader of standard output left after {shown}")
    except FlashVaedError as error:
        if is_only:
            raise
        tally.fail(clip.shown, error, progress)
        return
    if target.path is not None:
        tally.paths.append(target.path)
    tally.decoded.append(_record(target, written, output, player, time.perf_counter() - start))


def _is_written(
    written: _Written,
    latents: Float[Tensor, "1 C T Hz Wz"],
    target: DecodeTarget,
    player: Player,
    output: _Output,
    progress: Progress,
) -> bool:
    """Decode a clip into its target; False if memory ran out and smaller steps are left to try.

    A file is begun again with the smaller steps. What standard output has had stays, and what follows is appended.
    """
    clip, start = target.clip, time.perf_counter()
    before = written.num_frames if target.path is None else 0
    settings = {
        "fps": output.fps,
        "crf": output.crf,
        "stdout": output.stdout,
        "reads": output.reads,
        "force": output.force,
    }
    try:
        with progress.task(f"decode {clip.shown}", clip.num_frames) as task, target.open(**settings) as sink:
            num_seen = 0
            try:
                for frames in player.frames(latents, clip.scale):
                    written.size = (frames.shape[2], frames.shape[3])
                    num_seen, new = num_seen + frames.shape[1], frames[:, max(before - num_seen, 0) :]
                    sink.write(new)
                    task.advance(frames.shape[1], **{"frames/s": num_seen / (time.perf_counter() - start)})
            finally:
                written.num_frames = before + sink.num_frames
    except Exception as error:
        if not is_out_of_memory(error) or player.smaller_steps(latents) is None:
            raise
        return False
    return True


def _record(
    target: DecodeTarget, written: _Written, output: _Output, player: Player, seconds: float
) -> dict[str, Cell]:
    return {
        "latents": str(target.clip.path),
        "clip": target.clip.index,
        "latent_scale": target.clip.scale,
        "output": "-" if target.path is None else str(target.path),
        "format": target.format,
        "num_frames": written.num_frames,
        "height": written.size[0],
        "width": written.size[1],
        "fps": float(output.fps),
        "chunk": player.plan.chunk,
        "tile": player.plan.tile,
        "seconds": seconds,
        "frames_per_second": written.num_frames / seconds,
    }


def _table(decoded: Sequence[dict[str, Cell]], location: str) -> TableData:
    columns = {
        "latents": Column("latents", align="left"),
        "output": Column("output", align="left"),
        "num_frames": Column("frames", "d"),
        "width": Column("width", "d"),
        "height": Column("height", "d"),
        "chunk": Column("chunk", "d"),
        "tile": Column("tile", "d"),
        "seconds": Column("s", ".1f"),
        "frames_per_second": Column("frames/s", ".2f"),
    }
    rows = tuple(tuple(record[key] for key in columns) for record in decoded)
    return TableData(f"Decoded with {location}", tuple(columns.values()), rows)


def _clip_notes(recipe: DecodeRecipe, spec: DecoderSpec) -> tuple[str, ...]:
    """Why `--chunk` is ignored, if clips are decoded whole."""
    if recipe.chunk is None or not spec.sees_whole_clip:
        return ()
    tiles = spec.temporal_tiles
    taken = "each clip at once" if tiles is None else f"clips of {tiles.length} latents at once"
    return (
        f"--chunk {recipe.chunk} is ignored: this decoder sees whole clips, and takes {taken}. --clip-length gives "
        "shorter ones, and other frames",
    )


def _scale_notes(clips: Sequence[Clip]) -> tuple[str, ...]:
    notes = {
        "normalized": "latents taken as normalized, as diffusion models give them; for raw ones: --latent-scale raw",
        "raw": "latents taken as raw (ComfyUI's .latent always are), the scale that the decoder itself has",
    }
    return tuple(notes[scale] for scale in dict.fromkeys(clip.scale for clip in clips))
