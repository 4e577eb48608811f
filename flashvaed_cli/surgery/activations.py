"""The inputs of the next block in both decoders, clip by clip, on disk.

So memory does not grow with the number of clips. The folder is deleted with the store; it is made in `TMPDIR` (on a
machine that holds /tmp in memory, point that to a disk).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from jaxtyping import Float, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvaed_cli.atomic import scratch_folder

Stored = Shaped[Tensor, "..."]


class ActivationStore:
    """Named tensors of every clip, loaded one clip at a time. A context manager; a full disk is a FlashVaedError."""

    def __init__(self, device: str) -> None:
        self._until_the_end = ExitStack()
        self._folder = self._until_the_end.enter_context(scratch_folder("activations"))
        self._device = device

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._until_the_end.__exit__(kind, error, trace)

    def save(self, clip: int, name: str, tensors: Mapping[str, Stored]) -> None:
        """Keep tensors of a clip under a name, replacing earlier ones."""
        path = self._path(clip, name)
        fresh = path.with_suffix(".new")  # the tensors of the old file may still be mapped
        apart = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(apart, fresh)
        fresh.replace(path)

    def load(self, clip: int, name: str) -> dict[str, Stored]:
        """The tensors kept under a name, on the device; empty ones included."""
        return load_file(self._path(clip, name), device=self._device)

    def save_input(self, clip: int, decoder: str, x: Float[Tensor, "_B _C _T _H _W"]) -> None:
        """Keep the input of `decoder`'s next block."""
        self.save(clip, decoder, {"x": x.permute(0, 2, 3, 4, 1)})  # [B, T, H, W, C]

    def load_input(self, clip: int, decoder: str) -> Float[Tensor, "_B _C _T _H _W"]:
        """The input of `decoder`'s next block, channels-last, so that rows are gathered without copying the clip."""
        return self.load(clip, decoder)["x"].permute(0, 4, 1, 2, 3)

    def _path(self, clip: int, name: str) -> Path:
        return self._folder / f"{clip}.{name}.safetensors"
