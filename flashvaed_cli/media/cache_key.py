"""What a latent cache was made from: its key, and why a run may not be able to use another run's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashvaed_cli.media.cuts import Bucket, CutSettings

_MAX_NAMES_SHOWN = 3


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FileStamp:
    """A data file as it was: absolute path, size in bytes, time of its last change. Size -1: missing."""

    path: str
    num_bytes: int
    changed_ns: int


def stamp_file(path: Path) -> FileStamp:
    """The stamp of a file, without reading it."""
    path = path.absolute()
    try:
        status = path.stat()
    except OSError:
        return FileStamp(str(path), -1, 0)
    return FileStamp(str(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class CacheKey:
    """What determines the content of a cache.

    Attributes:
        vae: SHA-256 of the VAE that encodes.
        latent_scale: of latent files among `files`; None if there are none.
    """

    vae: str
    files: tuple[FileStamp, ...]
    latent_scale: str | None
    cut: CutSettings
    dtype: str

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return digest_of(asdict(self))


def cache_misfits(stored: CacheKey, wanted: CacheKey) -> list[str]:
    """Why a run cannot take its clips from a cache; empty if it can, which includes needing fewer or smaller clips."""
    reasons = []
    plain = {
        "VAE (SHA-256)": (stored.vae[:12], wanted.vae[:12]),
        "latent scale": (stored.latent_scale, wanted.latent_scale),
        "longest side": (stored.cut.max_side, wanted.cut.max_side),
        "seed": (stored.cut.seed, wanted.cut.seed),
        "number format": (stored.dtype, wanted.dtype),
    }
    reasons += [f"{name} {old} instead of {new}" for name, (old, new) in plain.items() if old != new]
    if files := _file_changes(stored.files, wanted.files):
        reasons.append(files)
    if stored.cut.num_clips < wanted.cut.num_clips:
        reasons.append(f"{stored.cut.num_clips} clips instead of {wanted.cut.num_clips}")
    listed = ", ".join(str(bucket) for bucket in stored.cut.buckets)
    reasons += [
        f"clips of {listed}, of which none covers {bucket}"
        for bucket in wanted.cut.buckets
        if not any(_covers(one, bucket) for one in stored.cut.buckets)
    ]
    return reasons


def _file_changes(stored: tuple[FileStamp, ...], wanted: tuple[FileStamp, ...]) -> str:
    old, new = ({stamp.path: stamp for stamp in stamps} for stamps in (stored, wanted))
    groups = {
        "not in it": [path for path in new if path not in old],
        "only in it": [path for path in old if path not in new],
        "changed since": [path for path in new if path in old and new[path] != old[path]],
    }
    texts = []
    for what, paths in groups.items():
        if paths:
            shown = ", ".join(paths[:_MAX_NAMES_SHOWN]) + (", ..." if len(paths) > _MAX_NAMES_SHOWN else "")
            texts.append(f"{len(paths)} data file{'s' if len(paths) > 1 else ''} {what} ({shown})")
    return "; ".join(texts)


def _covers(stored: Bucket, wanted: Bucket) -> bool:
    sides = ((stored.height, wanted.height), (stored.width, wanted.width))
    return stored.num_frames >= wanted.num_frames and all(
        old is None or (new is not None and old >= new) for old, new in sides
    )
