"""Encoded clips in a folder: shards of safetensors, what they were made of, and an index that is written last.

`key.json` comes first and says what the cache is made of; shards follow, each whole or not there at all; `index.json`
makes the cache complete. A run that is stopped before that leaves its shards, and the next one goes on behind them.
Clips are stored as `[C, T, Hz, Wz]` raw latents under their number, in float32 unless the key says float16 (11 bits
of mantissa, half the room). Shards are memory-mapped, so a reader holds only what it cuts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cuts import Bucket, ClipSize, CutSettings

FORMAT = 1
SHARD_BYTES = 64_000_000
SHARD_CLIPS = 256
SHARD_SECONDS = 60.0  # a shard is closed early, so that a kill costs at most a minute
_KEY_FILE, _INDEX_FILE, _LOCK_FILE = "key.json", "index.json", ".lock"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_MAX_OPEN_SHARDS = 64
_MAX_NAMES_SHOWN = 3


@dataclass(frozen=True)
class FileStamp:
    """A data file as it was: absolute path, size in bytes, time of its last change. Size -1: not there."""

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
    """What decides the content of a cache.

    Attributes:
        vae: SHA-256 of the VAE that encodes.
        latent_scale: of latent files among `files`; None where there are none.
    """

    vae: str
    files: tuple[FileStamp, ...]
    latent_scale: str | None
    cut: CutSettings
    dtype: str

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A complete file of the cache; `clips` gives the size of each by its number."""

    name: str
    num_bytes: int
    sha256: str
    clips: dict[int, ClipSize]


@dataclass(frozen=True)
class CachedLatents:
    """A complete cache, read in place. `skipped` names the files and clips that could not be encoded."""

    folder: Path
    key: CacheKey
    shards: tuple[Shard, ...]
    skipped: dict[str, str]
    sizes: dict[int, ClipSize] = field(init=False)
    _shard_of: dict[int, Shard] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shard_of = {number: shard for shard in self.shards for number in shard.clips}
        object.__setattr__(self, "_shard_of", shard_of)
        object.__setattr__(self, "sizes", {number: shard_of[number].clips[number] for number in sorted(shard_of)})

    def cut(self, number: int, size: ClipSize, top: int = 0, left: int = 0) -> Float[Tensor, "C T Hz Wz"]:
        """A prefix in time and a rectangle in space of one clip, as float32.

        Raises:
            MediaError: the shard is gone or damaged since it was checked.
        """
        shard = self._shard_of[number]
        path = self.folder / shard.name
        try:
            stored = _open_shard(path, shard.sha256).get_slice(_name(number))
            part = stored[:, : size.num_frames, top : top + size.height, left : left + size.width]
        except (SafetensorError, OSError) as error:
            raise MediaError(f"{path} cannot be read any more ({error}). Run again: it will be made anew.") from error
        return part.float()


def cache_misfits(stored: CacheKey, wanted: CacheKey) -> list[str]:
    """Why a run cannot take its clips from a cache; empty if it can: it may want fewer and smaller clips."""
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


def claim_folder(folder: Path, wanted: CacheKey) -> CacheKey:
    """The key of the cache in a folder; an empty or absent folder becomes a cache with the wanted one.

    Raises:
        MediaError: the folder holds something else, or a cache that the run cannot use.
    """
    if folder.exists() and not folder.is_dir():
        raise MediaError(f"{folder} is a file: give --cache-latents a folder.")
    stored = read_key(folder)
    if stored is None:
        others = [] if not folder.exists() else [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if others:
            raise MediaError(
                f"{folder} is not empty ({', '.join(sorted(others)[:_MAX_NAMES_SHOWN])}) and holds no latent cache. "
                "Give --cache-latents a new folder."
            )
        try:
            _write_json(folder / _KEY_FILE, {"format": FORMAT, **asdict(wanted)})
        except OSError as error:
            raise MediaError(f"{folder} cannot hold a latent cache: {error.strerror}. Give another folder.") from error
        return wanted
    if reasons := cache_misfits(stored, wanted):
        raise MediaError(
            f"{folder} caches other latents: {'; '.join(reasons)}. Give the settings and data it was made with, "
            "or another folder, or delete it to encode anew."
        )
    return stored


def read_key(folder: Path) -> CacheKey | None:
    """The key of a cache, complete or not; None if there is none.

    Raises:
        MediaError: unreadable, or of another version.
    """
    content = _read_json(folder / _KEY_FILE)
    if content is None:
        return None
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        cut = content.pop("cut")
        buckets = tuple(Bucket(**bucket) for bucket in cut.pop("buckets"))
        files = tuple(FileStamp(**stamp) for stamp in content.pop("files"))
        return CacheKey(**content, files=files, cut=CutSettings(**cut, buckets=buckets))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / _KEY_FILE, error) from error


def read_cache(folder: Path, key: CacheKey) -> CachedLatents | None:
    """The complete cache of a folder, its shards not yet checked; None if it is not complete.

    Raises:
        MediaError: the index cannot be read.
    """
    content = _read_json(folder / _INDEX_FILE)
    if content is None:
        return None
    try:
        if content["key"] != key.digest:
            return None
        shards = tuple(
            Shard(s["name"], s["num_bytes"], s["sha256"], {int(n): ClipSize(*size) for n, size in s["clips"].items()})
            for s in content["shards"]
        )
        return CachedLatents(folder, key, shards, dict(content["skipped"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / _INDEX_FILE, error) from error


def is_intact(folder: Path, shard: Shard, *, content: bool = True) -> bool:
    """Whether a shard is there in full; with `content` its SHA-256 is computed, which reads all of it."""
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    return not content or _sha256(path) == shard.sha256


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the same cache; the lock ends with the process.

    Raises:
        MediaError: another process writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MediaError(
                f"Another process is writing the latents of {folder}. Wait until it is done, or give another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


class CacheWriter:
    """Adds clips to a cache that is not complete. Use within `sole_writer`.

    A context manager: leaving it by an exception keeps what was added. `shards` are those that are there already.
    """

    def __init__(self, folder: Path, key: CacheKey, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.key = key
        self.shards: list[Shard] = []
        self._pending: dict[int, Tensor] = {}
        self._flushed_at = time.monotonic()
        (folder / _INDEX_FILE).unlink(missing_ok=True)
        for path in folder.glob(".shard-*.safetensors"):  # begun by a process that was killed
            path.unlink()
        for path in sorted(folder.glob("shard-*.safetensors")):
            shard = _scan_shard(path, key)
            if shard is None:
                warn(f"{path} is damaged or of another cache: its clips are encoded anew")
                path.unlink()
            else:
                self.shards.append(shard)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if error is not None:
                stack.enter_context(contextlib.suppress(MediaError))  # a full disk, which is known already
            self._flush()

    @property
    def numbers(self) -> set[int]:
        """Clips that are there already."""
        return {number for shard in self.shards for number in shard.clips}

    def add(self, number: int, latents: Float[Tensor, "C T Hz Wz"]) -> None:
        """Store a clip; it is on disk when its shard is full or a minute old, or the writer is left."""
        self._pending[number] = latents.detach().to("cpu", _DTYPES[self.key.dtype]).contiguous()
        num_bytes = sum(one.nbytes for one in self._pending.values())
        is_full = num_bytes >= SHARD_BYTES or len(self._pending) >= SHARD_CLIPS
        if is_full or time.monotonic() - self._flushed_at >= SHARD_SECONDS:
            self._flush()

    def finish(self, skipped: Mapping[str, str]) -> CachedLatents:
        """Write the index: the cache is complete."""
        self._flush()
        shards = [
            {**asdict(shard), "clips": {n: [s.num_frames, s.height, s.width] for n, s in shard.clips.items()}}
            for shard in self.shards
        ]
        document = {"format": FORMAT, "key": self.key.digest, "shards": shards, "skipped": dict(skipped)}
        _write_json(self.folder / _INDEX_FILE, document)
        return CachedLatents(self.folder, self.key, tuple(self.shards), dict(skipped))

    def _flush(self) -> None:
        if not self._pending:
            return
        taken = {shard.name for shard in self.shards}
        place = next(i for i in range(len(taken) + 1) if _shard_name(i) not in taken)
        path = self.folder / _shard_name(place)
        # The key "flashvaed" marks a file of ours, which no search for latents takes for data.
        metadata = {"flashvaed": "latent-cache", "key": self.key.digest}
        try:
            with atomic_path(path) as sibling:
                save_file({_name(number): one for number, one in self._pending.items()}, sibling, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise MediaError(
                f"{path} cannot be written ({error}); the {len(taken)} shards before it are kept. Make room, or give "
                "--cache-latents another folder, and run again."
            ) from error
        clips = {number: ClipSize(*one.shape[1:]) for number, one in self._pending.items()}
        self.shards.append(Shard(path.name, path.stat().st_size, _sha256(path), clips))
        self._pending = {}
        self._flushed_at = time.monotonic()


def _scan_shard(path: Path, key: CacheKey) -> Shard | None:
    """What a shard holds, by its own header; None if it is damaged or of another key."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key.digest:
                return None
            clips = {int(name): ClipSize(*file.get_slice(name).get_shape()[1:]) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError):
        return None
    return Shard(path.name, path.stat().st_size, _sha256(path), clips)


def drop_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Remove damaged shards; the cache is incomplete from then on."""
    (folder / _INDEX_FILE).unlink(missing_ok=True)
    for shard in shards:
        (folder / shard.name).unlink(missing_ok=True)


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_shard(path: Path, sha256: str) -> Any:
    """The mapped file; its hash tells it from one that was at the same place before."""
    return safe_open(path, framework="pt").__enter__()


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


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise _unreadable(path, ValueError("no JSON object"))
    return content


def _unreadable(path: Path, error: Exception) -> MediaError:
    return MediaError(
        f"{path} cannot be read as part of a latent cache ({error}). Delete the folder to encode anew, or give another."
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_path(path) as sibling:
        sibling.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(number: int) -> str:
    return f"{number:08d}"


def _shard_name(place: int) -> str:
    return f"shard-{place:05d}.safetensors"
