"""Where `decode` writes each clip, and in which format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BufferedIOBase
from pathlib import Path

from flashvaed_cli.errors import DecodeError
from flashvaed_cli.media.frames.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from flashvaed_cli.media.latent_files import LATENT_SUFFIXES
from flashvaed_cli.media.sinks import FrameSink
from flashvaed_cli.media.sinks.arrays import ArrayWriter
from flashvaed_cli.media.sinks.pictures import PictureFile, PictureFolder, picture_name
from flashvaed_cli.media.sinks.raw import RawWriter
from flashvaed_cli.media.writer import VideoWriter
from flashvaed_cli.ownership import SOFTWARE, is_own_file
from flashvaed_cli.paths import user_path
from flashvaed_cli.recipe.decode import STDOUT, DecodeRecipe
from flashvaed_cli.recipe.fields import FrameFormat, LatentScale
from flashvaed_cli.stages.common.compared import distinct_names
from flashvaed_cli.stages.common.outputs import (
    claim_file,
    claim_folder,
    filled_at_the_end,
    refuse_foreign_among,
    refuse_to_replace,
)

_FORMATS: dict[str, FrameFormat] = {".mp4": "mp4", ".png": "png", ".npy": "npy", ".pt": "pt", ".pth": "pt"}


@dataclass(frozen=True)
class Clip:
    """Clip `index` of a latent file's batch, `num_frames` long when decoded; `scale` is that of its latents."""

    path: Path
    index: int
    batch: int
    num_frames: int
    scale: LatentScale

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return self.path.name if self.batch == 1 else f"{self.path.name}, clip {self.index + 1} of {self.batch}"


@dataclass(frozen=True)
class DecodeTarget:
    """Where a clip's frames go. `path`: a file, or a folder of pictures; None: standard output."""

    clip: Clip
    path: Path | None
    format: FrameFormat
    is_folder: bool = False

    @contextmanager
    def open(
        self, *, fps: Fraction, crf: int, stdout: BufferedIOBase | None, reads: Sequence[str | Path], force: bool
    ) -> Iterator[FrameSink]:
        """The sink for the clip's frames; its output appears when the block ends without an error."""
        if self.is_folder:
            assert self.path is not None
            filled = filled_at_the_end(self.path, picture_name(0), reads, force=force)
            with filled as draft, PictureFolder(draft) as sink:
                yield sink
            _remove_later_pictures(self.path, self.clip.num_frames)
            return
        with self._open_file(fps=fps, crf=crf, stdout=stdout) as sink:
            yield sink

    def _open_file(self, *, fps: Fraction, crf: int, stdout: BufferedIOBase | None) -> FrameSink:
        if self.path is None:
            assert stdout is not None
            return RawWriter(stdout)
        if self.format == "mp4":
            return VideoWriter(self.path, fps=fps, crf=crf, comment=f"{SOFTWARE} decode")
        if self.format == "png":
            return PictureFile(self.path)
        return ArrayWriter(self.path, self.clip.num_frames)


def plan_targets(clips: Sequence[Clip], recipe: DecodeRecipe) -> list[DecodeTarget]:
    """One target for each clip, named after its latents; on disk this only checks which paths are folders.

    Raises:
        DecodeError: several clips for one file or standard output, or a format that does not fit the output.
    """
    if recipe.output == STDOUT:
        _require_one(clips, "standard output is one stream")
        if recipe.format is not None:
            raise DecodeError(
                f"--format {recipe.format}: --output {STDOUT} gives raw rgb24 frames; leave --format out."
            )
        return [DecodeTarget(clips[0], None, "mp4")]
    output = None if recipe.output is None else user_path(recipe.output)
    suffix = "" if output is None or recipe.output is None or recipe.output.endswith("/") else output.suffix.lower()
    if output is not None and suffix in _FORMATS and not output.is_dir():
        return [_one_file(clips, output, _FORMATS[suffix], recipe.format)]
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES | LATENT_SUFFIXES:
        raise DecodeError(f"--output {recipe.output}: {suffix} is not written; give one of {', '.join(_FORMATS)}.")
    folder, kind = output or Path(), recipe.format or "mp4"
    names = distinct_names([Path(_name(clip)) for clip in clips])
    if kind != "png":
        return [DecodeTarget(clip, folder / f"{name}.{kind}", kind) for clip, name in zip(clips, names, strict=True)]
    if output is not None and len(clips) == 1:
        return [DecodeTarget(clips[0], folder, kind, is_folder=True)]
    return [DecodeTarget(clip, folder / name, kind, is_folder=True) for clip, name in zip(clips, names, strict=True)]


def claim_targets(targets: Sequence[DecodeTarget], reads: Sequence[str], *, force: bool) -> None:
    """Check before the work that every target can be written.

    Raises:
        FlashVaedError: see `claim_file` and `claim_folder`.
    """
    paths = {target.path: target for target in targets if target.path is not None}
    refuse_to_replace(paths, reads)
    for path, target in paths.items():
        if target.is_folder:
            claim_folder(path, picture_name(0), force=force)
            if not force:
                refuse_foreign_among(path, [Path(picture_name(i)) for i in range(target.clip.num_frames)])
        else:
            claim_file(path, force=force, reads=reads)


def _one_file(clips: Sequence[Clip], output: Path, kind: FrameFormat, asked: FrameFormat | None) -> DecodeTarget:
    if asked not in (None, kind):
        raise DecodeError(f"--format {asked}: {output} is {output.suffix}. Give a folder, or leave --format out.")
    _require_one(clips, f"{output} is one file")
    if kind == "png" and clips[0].num_frames > 1:
        raise DecodeError(
            f"{output} is one picture, {clips[0].shown} has {clips[0].num_frames} frames: give a folder, "
            "and --format png."
        )
    return DecodeTarget(clips[0], output, kind)


def _require_one(clips: Sequence[Clip], why: str) -> None:
    if len(clips) > 1:
        raise DecodeError(f"{why}, and the latents hold {len(clips)} clips: give a folder with --output.")


def _name(clip: Clip) -> str:
    """A file name with the stem of the output."""
    return clip.path.name if clip.batch == 1 else f"{clip.path.stem}-{clip.index + 1}{clip.path.suffix}"


def _remove_later_pictures(folder: Path, num_frames: int) -> None:
    """Remove the pictures that an earlier, longer run wrote past the last frame."""
    number = num_frames
    while is_own_file(path := folder / picture_name(number)):
        path.unlink()
        number += 1
