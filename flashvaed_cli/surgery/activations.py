"""What the reference and the new decoder feed a block, clip by clip, kept on disk.

Memory then does not grow with the number of clips; the folder goes away with the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Clip = Float[Tensor, "_B _C _T _H _W"]


class ActivationPairs:
    """Pairs of tensors (reference's, new decoder's), one per clip. A context manager."""

    def __init__(self, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="flashvaed-")
        self._device = device
        self._num_clips = 0

    def __enter__(self) -> ActivationPairs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def __len__(self) -> int:
        return self._num_clips

    def fill(self, clips: Iterable[tuple[Clip, Clip]]) -> None:
        """Store the first pairs."""
        for reference, student in clips:
            self._save(self._num_clips, reference, student)
            self._num_clips += 1

    def __iter__(self) -> Iterator[tuple[Clip, Clip]]:
        """Every pair, loaded one at a time."""
        for index in range(self._num_clips):
            pair = load_file(self._path(index), device=self._device)
            yield pair["reference"], pair["student"]

    def advance(self, reference_block: nn.Module, student_block: nn.Module) -> None:
        """Replace every pair by what the two blocks make of it."""
        for index, (reference, student) in enumerate(self):
            self._save(index, reference_block(reference), student_block(student))

    def _save(self, index: int, reference: Clip, student: Clip) -> None:
        path = self._path(index)
        fresh = path.with_suffix(".new")  # the tensors of the old file may still be mapped
        save_file({"reference": reference.contiguous(), "student": student.contiguous()}, fresh)
        fresh.replace(path)

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.safetensors"
