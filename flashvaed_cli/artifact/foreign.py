"""Read the weights of other programs: `.safetensors`, `.pth` without running its code, diffusers folders."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashvaed_cli.artifact.recognition import common_prefix
from flashvaed_cli.artifact.store import read_metadata
from flashvaed_cli.errors import ArtifactError

CONFIG_NAME = "config.json"
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# Names of files that hold a whole model: those of its diffusion model, and the wrappers of its VAE.
_DIFFUSION_MODEL, _VAES = "model.diffusion_model.", ("vae.", "first_stage_model.")
# Keys under which training programs keep the weights.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "vae", "weights")


@dataclass(frozen=True)
class ForeignWeights:
    """Weights as found, less the wrapper that all names share.

    `config` is that of a diffusers folder, `metadata` that of the safetensors file, `files` all that was read.
    `whole_folder`: the folder was given, so its config must fit the weights.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    whole_folder: bool = False


def read_foreign(path: Path) -> ForeignWeights:
    """Read a checkpoint file or a diffusers folder.

    Raises:
        ArtifactError: missing, truncated, of no known format, or a pickle that wants to run code.
    """
    if path.is_dir():
        return _read_folder(path)
    tensors, metadata = _read_weights(path)
    beside = path.parent / CONFIG_NAME
    if path.name.startswith(_DIFFUSERS_STEM) and beside.is_file():
        return ForeignWeights(_unwrapped(tensors), (path, beside), _read_config(beside), metadata)
    return ForeignWeights(_unwrapped(tensors), (path,), None, metadata)


def _read_folder(folder: Path) -> ForeignWeights:
    if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"  # a whole diffusers pipeline
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise ArtifactError(
            f"{folder}: a folder without {CONFIG_NAME}, so no diffusers model. Give the checkpoint file itself."
        )
    files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, metadata = _read_weights(file)
        tensors.update(found)
    metadata = metadata if len(files) == 1 else {}  # those of a shard say nothing of the whole
    read = (config_path, *files)
    return ForeignWeights(_unwrapped(tensors), read, _read_config(config_path), metadata, whole_folder=True)


def _weight_files(folder: Path) -> list[Path]:
    """The file or shards of the weights; float32 before its half-precision variants."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: (len(path.name), path.name))
    if indexes:
        weight_map = _read_config(indexes[0]).get("weight_map") or {}
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent or not shards:
            raise ArtifactError(f"{folder}: {indexes[0].name} names shards that are not there: {', '.join(absent)}.")
        return shards
    names = (f"{_DIFFUSERS_STEM}.safetensors", f"{_DIFFUSERS_STEM}.fp16.safetensors", f"{_DIFFUSERS_STEM}.bin")
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
    others = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    chosen = [path for path in others if path.suffix == _SUFFIXES[0]] or others
    if len(chosen) == 1:
        return chosen
    listed = ", ".join(path.name for path in others) or "none"
    raise ArtifactError(f"{folder}: no {names[0]} (weights files there: {listed}). Give one file by its path.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file; its first bytes, not its name, tell the format."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from error
    if head.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"{path}: a Git LFS pointer, not the weights. Fetch them with 'git lfs pull'.")
    if head.startswith(b"GGUF"):
        raise ArtifactError(f"{path}: a GGUF file; this version reads safetensors and PyTorch files.")
    is_index = head[8:9] == b"{"  # safetensors: a length, of whatever first byte, then JSON
    if head.startswith((b"PK", b"\x80")) and not is_index:
        return _read_pickle(path), {}
    metadata = read_metadata(path)
    try:
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot read its tensors: {error}. Copy or download it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = _load_weights_only(path)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"{path}: not a plain file of weights: reading it could run code, which flashvaed never does. "
            "Where you trust it, load it in PyTorch and save its state dict as safetensors. "
            f"(torch: {reason:.200})"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ArtifactError(
            f"{path}: cannot be read as a PyTorch file ({type(error).__name__}: {str(error).strip():.200}). "
            "It is damaged, truncated or of another format: copy or download it again."
        ) from error
    return _weights_in(content, path)


def _load_weights_only(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols: whether it could be read is what counts
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6


def _weights_in(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a `.pth` holds, through the wrappers that training programs put around it."""
    while isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is not None:
            content = content[wrapper]
        elif tensors:
            return tensors
        else:
            break
    keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
    raise ArtifactError(
        f"{path}: holds a {type(content).__name__}{keys}, no state dict. Save the VAE's state dict as safetensors."
    )


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors less the wrapper that all names share; of a file that holds a whole model, those of its VAE."""
    if any(name.startswith((_DIFFUSION_MODEL, "vae.per_channel_statistics.")) for name in tensors):
        wrapper = next((part for part in _VAES if any(name.startswith(part) for name in tensors)), "")
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(wrapper)}
    prefix = common_prefix(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
