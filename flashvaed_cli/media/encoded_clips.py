"""Latents of clips that an earlier command encoded, in the user's cache folder.

`analyze`, `prune` and `convert-ops` calibrate on the same clips, and encoding them takes a fifth of their time. Each
clip is a file named by what determines its latents, so that another VAE, video, cut or version never finds it. The
folder keeps to a size; what was used longest ago goes first. It can be deleted at any time, a folder that cannot be
read or written is no error, and `FLASHVAED_CACHE=off` remembers nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.media.cache_key import digest_of
from flashvaed_cli.paths import cache_folder

MAX_BYTES = 500_000_000
_SUFFIX, _NAME = ".safetensors", "latents"


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
            stored = load_file(path)
            latents = stored[_NAME]
        except (OSError, SafetensorError, KeyError):
            return None
        if latents.dtype != torch.float32 or latents.ndim != 5 or not torch.isfinite(latents).all():
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return latents

    def store(self, facts: Mapping[str, Any], latents: Float[Tensor, "1 C T Hz Wz"]) -> None:
        """Remember latents; if the folder cannot be written, nothing happens."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError, SafetensorError), atomic_path(self._path(facts)) as sibling:
            save_file({_NAME: latents.detach().float().cpu().contiguous()}, sibling)
        self._trim()

    def _path(self, facts: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest_of(facts)}{_SUFFIX}"

    def _trim(self) -> None:
        """Remove the files that were used longest ago, until the rest keeps to the size."""
        assert self.folder is not None
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
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
