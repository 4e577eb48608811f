"""Latents of clips that an earlier command encoded, in the user's cache folder.

`analyze`, `prune` and `convert-ops` calibrate on the same clips, and encoding them takes a fifth of their time. Each
clip is a file named by what determines its latents, so that another VAE, video, cut or version never finds it. The
folder keeps to a size; what was used longest ago goes first. It can be deleted at any time, a folder that cannot be
read or written is no error, and `FLASHVAED_CACHE=off` remembers nothing. The checksum in a file covers its name, shape
and values, so that what is damaged or was put there by others is encoded again. Other files in the folder stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import TensorFileError
from flashvaed_cli.media.cache_key import digest_of
from flashvaed_cli.ownership import REMEMBERED_KEY
from flashvaed_cli.paths import cache_folder
from flashvaed_cli.untrusted.files import read_bounded

MAX_BYTES = 500_000_000
_SUFFIX, _NAME, _CHECKSUM = ".safetensors", "latents", "sha256"
_OWN_NAME = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.partial-.*")


@dataclass(frozen=True)
class EncodedClips:
    """A folder of encoded clips; None: nothing is remembered."""

    folder: Path | None
    max_bytes: int = MAX_BYTES

    @classmethod
    def of_user(cls) -> EncodedClips:
        """`flashvaed/latents` in the user's cache folder; for a user without one, nothing is remembered."""
        try:
            return cls(cache_folder() / "latents")
        except FileNotFoundError:
            return cls(None)

    def find(self, facts: Mapping[str, Any]) -> Float[Tensor, "1 C T Hz Wz"] | None:
        """The latents that were stored under these facts; None if there are none, or the file is damaged."""
        if self.folder is None:
            return None
        path = self._path(facts)
        try:
            stored = load(read_bounded(path, self.max_bytes))
            latents, checksum = stored[_NAME].clone(), stored[_CHECKSUM]  # of the bytes read, which need not be aligned
        except (OSError, TensorFileError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
            return None
        if latents.dtype != torch.float32 or not torch.equal(checksum, _checksum(path.stem, latents)):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return latents

    def store(self, facts: Mapping[str, Any], latents: Float[Tensor, "1 C T Hz Wz"]) -> None:
        """Remember latents; if the folder cannot be written, nothing happens."""
        if self.folder is None:
            return
        path = self._path(facts)
        plain = latents.detach().float().cpu().contiguous()
        content = {_NAME: plain, _CHECKSUM: _checksum(path.stem, plain)}
        with contextlib.suppress(OSError, SafetensorError):
            with atomic_path(path) as sibling:
                save_file(content, sibling, metadata={REMEMBERED_KEY: "an encoded clip"})
            self._trim()

    def _path(self, facts: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest_of(facts)}{_SUFFIX}"

    def _trim(self) -> None:
        """Remove the files that were used longest ago, until the rest keeps to the size."""
        assert self.folder is not None
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if not _OWN_NAME.fullmatch(path.stem):  # the user's: FLASHVAED_CACHE may name any folder
                continue
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _checksum(name: str, latents: Float[Tensor, "*shape"]) -> UInt8[Tensor, " 32"]:
    """SHA-256 of the name of a file, which stands for what determines the latents, their shape and their values."""
    digest = hashlib.sha256(f"{name} {tuple(latents.shape)}".encode())
    digest.update(latents.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
