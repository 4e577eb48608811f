"""Read the weights of other programs: `.safetensors`, `.pth` without running its code, diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flashvaed_cli.artifact.foreign.state_dicts import choose_weights
from flashvaed_cli.artifact.foreign.weight_files import STEM, read_config, weight_files
from flashvaed_cli.artifact.store import read_metadata
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.untrusted.files import open_regular
from flashvaed_cli.untrusted.pytorch_file import load_pytorch
from flashvaed_cli.untrusted.safetensors_file import load_safetensors

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class ForeignWeights:
    """Weights as found, without the wrapper that all names share.

    Attributes:
        files: all that were read.
        config: of a diffusers folder.
        metadata: of the safetensors file.
        arguments: those of the file's trainer, if the file has them.
        whole_folder: the folder was given, so its config must fit the weights.
        note: which of several sets was read.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    whole_folder: bool = False
    note: str | None = None


def read_foreign(path: Path, wanted: str | None = None) -> ForeignWeights:
    """Read a checkpoint file or a diffusers folder.

    Args:
        wanted: which of several sets or variants (`ema`, or the file's own name).
    Raises:
        ArtifactError: missing, truncated, of an unknown format, a pickle with code to run, or without such weights.
    """
    if path.is_dir():
        return _read_folder(path, wanted)
    content, metadata = _read_content(path)
    tensors, note = choose_weights(content, str(path), wanted)
    files = checkpoint_files(path)
    config = read_config(files[1]) if len(files) > 1 else None
    arguments = content.get("args") if isinstance(content, Mapping) else None
    arguments = {str(key): value for key, value in arguments.items()} if isinstance(arguments, Mapping) else {}
    return ForeignWeights(tensors, files, config, metadata, arguments, note=note)


def checkpoint_files(path: Path, wanted: str | None = None) -> tuple[Path, ...]:
    """The files of a checkpoint, which its SHA-256 covers; in a folder, the index of shards is read for them.

    Raises:
        ArtifactError: a folder without a model.
    """
    if path.is_dir():
        config_path = _config_of(path)
        return (config_path, *weight_files(config_path.parent, wanted)[0])
    beside = path.parent / CONFIG_NAME
    return (path, beside) if path.name.startswith(STEM) and beside.is_file() else (path,)


def _config_of(folder: Path) -> Path:
    if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"  # a whole diffusers pipeline
    if not (folder / CONFIG_NAME).is_file():
        raise ArtifactError(
            f"{folder}: a folder without {CONFIG_NAME}, so not a diffusers model. Give the checkpoint file itself."
        )
    return folder / CONFIG_NAME


def _read_folder(folder: Path, wanted: str | None) -> ForeignWeights:
    config_path = _config_of(folder)
    folder = config_path.parent
    files, variant = weight_files(folder, wanted)
    content: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, metadata = _read_content(file)
        if not isinstance(found, Mapping):
            raise ArtifactError(f"{file}: holds a {type(found).__name__}, not a state dict. Download it again.")
        content |= {str(key): value for key, value in found.items()}
    metadata = metadata if len(files) == 1 else {}  # a shard's metadata are not those of the whole
    tensors, note = choose_weights(content, str(folder), None if wanted == variant else wanted)
    read = (config_path, *files)
    return ForeignWeights(tensors, read, read_config(config_path), metadata, whole_folder=True, note=note)


def _read_content(path: Path) -> tuple[object, dict[str, str]]:
    """The content and metadata of one file; the format is read from its first bytes, not from its name."""
    try:
        with open_regular(path) as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise ArtifactError(f"{path}: a Git LFS pointer, not the weights. Fetch them with 'git lfs pull'.")
        if head.startswith(b"GGUF"):
            raise ArtifactError(f"{path}: a GGUF file; this version reads safetensors and PyTorch files.")
        is_index = head[8:9] == b"{"  # safetensors: a length, of whatever first byte, then JSON
        if head.startswith((b"PK", b"\x80")) and not is_index:
            return load_pytorch(path), {}
        metadata = read_metadata(path)
        return load_safetensors(path), metadata
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}.") from error
