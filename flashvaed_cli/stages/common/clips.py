"""From the recipe's data to calibration latents: cut and encode videos, read latent files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import av
import PIL
import torch
from jaxtyping import Float
from torch import Tensor

import flashvaed_cli
from flashvaed_cli import __version__
from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.run.latent_scale import figures_over
from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.decoders.variants.exact import exact_coder
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cache_key import FileStamp, stamp_file
from flashvaed_cli.media.clips import ClipRequest, load_clip, plan_clips, usable_files
from flashvaed_cli.media.cuts import none_usable
from flashvaed_cli.media.encoded_clips import EncodedClips
from flashvaed_cli.media.latent_files import is_always_raw, is_latent_file, load_latents
from flashvaed_cli.media.padding import pad_clip
from flashvaed_cli.media.sources import find_clips
from flashvaed_cli.metrics.autotune import device_name
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.fields import LatentScale
from flashvaed_cli.recipe.settings import CalibratedRecipe
from flashvaed_cli.stages.common.fitted_clips import fitted_to_vae
from flashvaed_cli.zoo.builtin import FITTING_CLIPS


def find_data(data: Sequence[str], default: Sequence[Path] = FITTING_CLIPS) -> list[Path]:
    """The files that the recipe's `data` names; if it names none, the clips that ship with the program."""
    return find_clips(data) if data else list(default)


def raw_latents(path: Path, scale: LatentScale, vae: Checkpoint) -> Float[Tensor, "B C T Hz Wz"]:
    """A latent file in the scale that decoders take."""
    return to_raw(load_latents(path, latent_width=vae.latent_width), scale_of(path, scale), vae)


def scale_of(path: Path, given: LatentScale) -> LatentScale:
    """The scale of a file: decided by its kind, or else the one that the user gives."""
    return "raw" if is_always_raw(path) else given


def to_raw(latents: Float[Tensor, "B C T Hz Wz"], scale: LatentScale, vae: Checkpoint) -> Float[Tensor, "B C T Hz Wz"]:
    """Convert latents to the scale that decoders take: raw = normalized * std + mean.

    Raises:
        ArtifactError: the latents are normalized and the VAE has no statistics.
    """
    if scale == "raw":
        return latents
    mean, std = (figures_over(row, latents) for row in vae.require_statistics())
    return latents * std + mean


@dataclass(frozen=True)
class CalibrationClips:
    """A plan of clips; every pass over it loads and encodes them again, one at a time.

    A clip that turns out to be damaged is named and left out, in that pass and in later ones.
    """

    vae: Checkpoint
    requests: tuple[ClipRequest, ...]
    latent_files: tuple[Path, ...]
    latent_scale: LatentScale
    num_frames: int
    crop_size: int | None
    device: torch.device
    progress: Progress
    broken: dict[str, str] = field(default_factory=dict)
    encoded: EncodedClips = field(default_factory=EncodedClips.of_user)
    _skipped: dict[ClipRequest | Path, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.requests) + len(self.latent_files) - len(self._skipped)

    @property
    def files(self) -> list[Path]:
        """The files that clips come from, each once."""
        return list(dict.fromkeys(_file_of(clip) for clip in (*self.requests, *self.latent_files)))

    @property
    def skipped(self) -> dict[str, str]:
        """The files of clips that were left out, with the reason."""
        return self.broken | {str(_file_of(clip)): reason for clip, reason in self._skipped.items()}

    def __iter__(self) -> Iterator[Float[Tensor, "B C T Hz Wz"]]:
        """Raw latents, one clip at a time.

        Raises:
            MediaError: no clip is left.
        """
        for clip in (*self.requests, *self.latent_files):
            if clip in self._skipped:
                continue
            try:
                latents = self._load(clip)
            except MediaError as error:  # damaged after the frames that the plan checked, or changed since
                self._skipped[clip] = str(error)
                self.progress.warn(f"skipped {_file_of(clip)}: {error}")
                continue
            yield latents
        if not len(self):
            raise none_usable(len(self._skipped), {Path(path): reason for path, reason in self.skipped.items()})

    def pixels(self) -> Iterator[Float[Tensor, "1 3 T H W"]]:
        """The videos themselves, padded to what the encoder takes; latent files have none.

        Raises:
            MediaError: a video can no longer be read.
        """
        for clip in self.requests:
            if clip not in self._skipped:
                yield encodable(self.vae, load_clip(clip))[None].to(self.device)

    def _load(self, clip: ClipRequest | Path) -> Float[Tensor, "B C T Hz Wz"]:
        if isinstance(clip, ClipRequest):
            return self._encode(clip)
        return self._cut(raw_latents(clip, self.latent_scale, self.vae)).to(self.device)

    def _encode(self, clip: ClipRequest) -> Float[Tensor, "1 C T Hz Wz"]:
        """The latents of a clip, from the user's cache if an earlier pass or command encoded it."""
        stamp = stamp_file(clip.path)
        facts = _what_determines(self.vae, clip, stamp, self.device)
        latents = self.encoded.find(facts)
        if latents is not None:
            self._tell_once(f"clips that were encoded before come from {self.encoded.folder}")
            return latents.to(self.device)
        latents = encode_clip(self.vae, load_clip(clip), self.device)
        if stamp_file(clip.path) == stamp:  # the file is still the one that was read
            self.encoded.store(facts, latents)
        return latents

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.progress.log(message)

    def _cut(self, latents: Float[Tensor, "B C T Hz Wz"]) -> Float[Tensor, "B C t hz wz"]:
        """The first frames, and the middle of each, as large as a clip cut from a video would be."""
        spec = self.vae.require_decoder().spec
        num_frames = 1 + (self.num_frames - 1) // spec.temporal_factor
        side = max(latents.shape[-2:]) if self.crop_size is None else self.crop_size // spec.spatial_factor
        top, left = (max((size - side) // 2, 0) for size in latents.shape[-2:])
        return latents[:, :, :num_frames, top : top + side, left : left + side]


def _what_determines(vae: Checkpoint, clip: ClipRequest, stamp: FileStamp, device: torch.device) -> dict[str, Any]:
    """All that the latents of a clip depend on, to the last bit."""
    cut = {name: value for name, value in asdict(clip).items() if name != "path"}
    return {
        "version": __version__,
        "code": _newest_change(),
        "torch": torch.__version__,
        "av": av.__version__,
        "pillow": PIL.__version__,
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "vae": vae.sha256,
        "encoder": vae.require_encoder().spec.model_dump(mode="json"),
        "file": asdict(stamp),
        "cut": cut,
    }


@cache
def _newest_change() -> int:
    """When the program's code last changed, in nanoseconds: in a clone, without a change of version."""
    return max(path.stat().st_mtime_ns for path in Path(str(flashvaed_cli.__file__)).parent.rglob("*.py"))


def _file_of(clip: ClipRequest | Path) -> Path:
    return clip if isinstance(clip, Path) else clip.path


@torch.no_grad()
def encode_clip(vae: Checkpoint, clip: Float[Tensor, "3 T H W"], device: torch.device) -> Float[Tensor, "1 C T Hz Wz"]:
    """Encode the most frames of a clip that are whole latents; sides are padded to what the encoder takes."""
    return encode(exact_coder(vae.require_encoder()), encodable(vae, clip)[None].to(device))


def encodable(vae: Checkpoint, clip: Float[Tensor, "3 T H W"]) -> Float[Tensor, "3 t h w"]:
    """The most frames of a clip that are whole latents, with sides padded to what the encoder takes."""
    spec = vae.require_encoder().spec
    step = spec.temporal_factor
    clip = clip[:, : 1 + (clip.shape[1] - 1) // step * step]
    return pad_clip(clip, temporal_factor=step, spatial_factor=spec.spatial_factor)


def plan_calibration(
    vae: Checkpoint,
    recipe: CalibratedRecipe,
    num_clips: int,
    device: torch.device,
    progress: Progress,
    *,
    still: bool = False,
) -> CalibrationClips:
    """Choose the clips. Broken videos are named and left out; latent files are cut to the same size.

    Sizes that the VAE does not take are rounded down, with a warning.

    Args:
        still: single frames, whatever the recipe says: for a decoder of single images.
    Raises:
        MediaError: nothing found, nothing readable, or sides that hold no latent.
        ArtifactError: videos are given, but there is no encoder.
    """
    recipe = fitted_to_vae(recipe, vae, progress, still=still)
    paths = find_data(recipe.data)
    latent_files, broken = _usable_latents([path for path in paths if is_latent_file(path)], num_clips, vae)
    videos = [path for path in paths if not is_latent_file(path)]
    requests: list[ClipRequest] = []
    if videos and len(latent_files) < num_clips:
        vae.require_encoder()
        try:
            requests, broken_videos = plan_clips(
                videos,
                num_clips=num_clips - len(latent_files),
                num_frames=recipe.num_frames,
                max_side=recipe.max_side,
                crop_size=None if recipe.crop_size is None else (recipe.crop_size, recipe.crop_size),
                seed=recipe.seed,
            )
            broken |= broken_videos
        except MediaError as error:  # no video is usable; the latent files may suffice
            if not latent_files:
                raise
            broken |= {path: str(error) for path in videos[:1]}
    if not requests and not latent_files:
        raise none_usable(len(paths), broken)
    for path, reason in broken.items():
        progress.warn(f"skipped {path}: {reason}")
    return CalibrationClips(
        vae,
        tuple(requests),
        tuple(latent_files),
        latent_scale=recipe.latent_scale,
        num_frames=recipe.num_frames,
        crop_size=recipe.crop_size,
        device=device,
        progress=progress,
        broken={str(path): reason for path, reason in broken.items()},
    )


def _usable_latents(paths: Sequence[Path], limit: int, vae: Checkpoint) -> tuple[list[Path], dict[Path, str]]:
    """The first `limit` latent files that fit the decoder, and what is wrong with the files passed over."""
    if not paths:
        return [], {}
    try:
        return usable_files(paths, limit, latent_width=vae.latent_width)
    except MediaError as error:
        if len(paths) == 1:
            raise
        return [], {paths[0]: str(error)}
