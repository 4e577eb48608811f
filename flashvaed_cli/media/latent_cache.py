"""Encoded clips in a folder: safetensors shards, what they were made from, and an index that is written last.

`key.json` comes first and says what the cache is made from; shards follow, each written atomically; `index.json`
makes the cache complete. A run that is stopped before that leaves its shards, and the next one continues after them.
Clips are stored as `[C, T, Hz, Wz]` raw latents under their number, in float32 unless the key says float16 (11 bits
of mantissa, half the space). Shards are memory-mapped, so a reader holds only what it cuts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import MediaError
from flashvaed_cli.locks import exclusive_lock
from flashvaed_cli.media.cache_key import CacheKey, FileStamp, cache_misfits, digest_of
from flashvaed_cli.media.cuts import Bucket, ClipSize, CutSettings

FORMAT = 1
SHARD_BYTES = 64_000_000
SHARD_CLIPS = 256
SHARD_SECONDS = 60.0  # a shard is closed early, so that a kill costs at most a minute
_KEY_FILE, _INDEX_FILE, _LOCK_FILE = "key.json", "index.json", ".lock"
_MARK, _MARK_VALUE = "flashvaed", "latent-cache"  # marks our own file, which searches for latents skip
_SHARD_NAME = re.compile(r"shard-\d{5,}\.safetensors")
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_MAX_OPEN_SHARDS = 64
_MAX_NAMES_SHOWN = 3
DataT = TypeVar("DataT")


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
            raise MediaError(f"{path} cannot be read any more ({error}). Run again: it will be rebuilt.") from error
        return part.float()


def claim_cache(folder: Path, wanted: CacheKey) -> CacheKey:
    """The key of the cache in a folder; an empty or absent folder becomes a cache with the wanted key.

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
                f"{folder} is not empty ({', '.join(sorted(others)[:_MAX_NAMES_SHOWN])}) and is not a latent cache. "
                "Give --cache-latents a new folder."
            )
        try:
            _write_json(folder / _KEY_FILE, {"format": FORMAT, **asdict(wanted)})
        except OSError as error:
            raise MediaError(f"{folder} cannot hold a latent cache: {error.strerror}. Give another folder.") from error
        return wanted
    if reasons := cache_misfits(stored, wanted):
        raise MediaError(
            f"{folder} caches other latents: {'; '.join(reasons)}. Give the settings and data that it was made with, "
            "or another folder, or delete it to encode again."
        )
    return stored


def read_key(folder: Path) -> CacheKey | None:
    """The key of a cache, complete or not; None if there is none.

    Raises:
        MediaError: unreadable, or of another version.
    """
    try:
        content = _read_json(folder / _KEY_FILE)
        if content is None:
            return None
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        cut = content.pop("cut")
        buckets = tuple(_checked(Bucket(**bucket)) for bucket in cut.pop("buckets"))
        files = tuple(_checked(FileStamp(**stamp)) for stamp in content.pop("files"))
        return _checked(CacheKey(**content, files=files, cut=_checked(CutSettings(**cut, buckets=buckets))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / _KEY_FILE, error) from error


def read_cache(folder: Path, key: CacheKey, warn: Callable[[str], None]) -> CachedLatents | None:
    """The complete cache of a folder, its shards not yet checked; None if it is not complete.

    A damaged index is one that is missing: `CacheWriter` rebuilds it from the shards. `warn` is told.

    Raises:
        MediaError: the index exists but must not be read.
    """
    path = folder / _INDEX_FILE
    try:
        content = _read_json(path)
        if content is None:
            return None
        stated = content.pop("sha256", None)  # absent from the earliest caches
        if stated is not None and stated != digest_of(content):
            raise ValueError("its content does not match its checksum")
        if content["key"] != key.digest:
            return None
        shards = tuple(_shard_of_record(record) for record in content["shards"])
        return CachedLatents(folder, key, shards, _texts(content["skipped"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        warn(f"{path} is damaged ({reason}): it is rebuilt from the shards, and what they lack is encoded again")
        return None


def _texts(content: Any) -> dict[str, str]:
    if not all(isinstance(text, str) for text in content.values()):
        raise TypeError("what was skipped has reasons that are no text")
    return dict(content)


def _shard_of_record(record: Mapping[str, Any]) -> Shard:
    if not _SHARD_NAME.fullmatch(record["name"]):
        raise ValueError(f"{record['name']!r} is no shard")
    clips = {int(number): _checked(ClipSize(*size)) for number, size in record["clips"].items()}
    return _checked(Shard(record["name"], record["num_bytes"], record["sha256"], clips))


def _checked(found: DataT) -> DataT:
    """A dataclass made of JSON values, if those have the types of its fields; what containers hold is checked before.

    Raises:
        TypeError: one is not.
    """
    for name, kind in _kinds(type(found)).items():
        if not isinstance(value := getattr(found, name), kind):
            raise TypeError(f"{name} is {value!r:.40}")
    return found


@lru_cache
def _kinds(of: type) -> dict[str, Any]:
    """What `isinstance` takes for each field of a dataclass: containers without what they hold."""
    hints = get_type_hints(of)
    return {name: origin if (origin := get_origin(hint)) in (dict, tuple) else hint for name, hint in hints.items()}


def is_intact(folder: Path, shard: Shard, *, content: bool = True) -> bool:
    """Whether a shard is complete; with `content` its SHA-256 is checked, which reads all of it."""
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
    with exclusive_lock(
        folder / _LOCK_FILE,
        lambda holder: MediaError(
            f"Another process is writing the latents of {folder} ({holder}). Wait until it is done, or give another "
            "folder."
        ),
    ):
        yield


class CacheWriter:
    """Adds clips to an incomplete cache. Use within `sole_writer`.

    A context manager: leaving it by an exception keeps what was added. `shards` are those that already exist.
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
            if shard is not None:
                self.shards.append(shard)
            elif _is_ours(path):
                warn(f"{path} is damaged or of another cache: its clips are encoded again")
                path.unlink()
            else:
                warn(f"{path} does not belong to this cache: it is left alone")

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if error is not None:
                stack.enter_context(contextlib.suppress(MediaError))  # a full disk, which has been reported already
            self._flush()

    @property
    def numbers(self) -> set[int]:
        """Clips that are already stored."""
        return {number for shard in self.shards for number in shard.clips}

    def add(self, number: int, latents: Float[Tensor, "C T Hz Wz"]) -> None:
        """Store a clip; it reaches the disk when its shard is full or a minute old, or the writer is closed."""
        self._pending[number] = latents.detach().to("cpu", _DTYPES[self.key.dtype]).contiguous()
        num_bytes = sum(one.nbytes for one in self._pending.values())
        is_full = num_bytes >= SHARD_BYTES or len(self._pending) >= SHARD_CLIPS
        if is_full or time.monotonic() - self._flushed_at >= SHARD_SECONDS:
            self._flush()

    def finish(self, skipped: Mapping[str, str]) -> CachedLatents:
        """Write the index: the cache is complete."""
        self._flush()
        shards = [
            {**asdict(shard), "clips": {str(n): [s.num_frames, s.height, s.width] for n, s in shard.clips.items()}}
            for shard in self.shards
        ]
        document = {"format": FORMAT, "key": self.key.digest, "shards": shards, "skipped": dict(skipped)}
        _write_json(self.folder / _INDEX_FILE, {**document, "sha256": digest_of(document)})
        return CachedLatents(self.folder, self.key, tuple(self.shards), dict(skipped))

    def _flush(self) -> None:
        if not self._pending:
            return
        path = next(p for p in map(self._path, itertools.count()) if not p.exists())
        metadata = {_MARK: _MARK_VALUE, "key": self.key.digest}
        try:
            with atomic_path(path) as sibling:
                save_file({_name(number): one for number, one in self._pending.items()}, sibling, metadata=metadata)
        except OSError as error:
            raise MediaError(
                f"{path} cannot be written ({error.strerror}); the {len(self.shards)} shards before it are kept. "
                "Free some space, or give --cache-latents another folder, and run again."
            ) from error
        clips = {number: ClipSize(*one.shape[1:]) for number, one in self._pending.items()}
        self.shards.append(Shard(path.name, path.stat().st_size, _sha256(path), clips))
        self._pending = {}
        self._flushed_at = time.monotonic()

    def _path(self, place: int) -> Path:
        return self.folder / f"shard-{place:05d}.safetensors"


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


def _is_ours(path: Path) -> bool:
    """Whether a file named like a shard is one, of any cache; an unreadable one is a damaged shard."""
    if not _SHARD_NAME.fullmatch(path.name):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_MARK) == _MARK_VALUE
    except SafetensorError:
        return True
    except OSError:
        return False


def drop_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Remove damaged shards; this leaves the cache incomplete."""
    (folder / _INDEX_FILE).unlink(missing_ok=True)
    for shard in shards:
        (folder / shard.name).unlink(missing_ok=True)


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_shard(path: Path, sha256: str) -> Any:
    """The mapped file; its hash distinguishes it from an earlier file at the same path."""
    return safe_open(path, framework="pt").__enter__()


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None if there is none.

    Raises:
        MediaError: it may not be read.
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except RecursionError:
        raise ValueError("brackets nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _unreadable(path: Path, error: Exception) -> MediaError:
    return MediaError(f"{path} cannot be read as part of a latent cache ({error}). Delete the folder, or give another.")


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_path(path) as sibling:
        sibling.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(number: int) -> str:
    return f"{number:08d}"
