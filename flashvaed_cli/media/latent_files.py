"""Latents from files: tensors in any layout that people save, checked against the decoder they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.limits import MAX_LATENT
from flashvaed_cli.untrusted.files import open_regular
from flashvaed_cli.untrusted.pytorch_file import load_pytorch
from flashvaed_cli.untrusted.safetensors_file import load_safetensors

LATENT_SUFFIXES = frozenset({".safetensors", ".latent", ".pt", ".pth", ".npy"})
_COMFYUI_SUFFIX = ".latent"
_NAMES = ("latents", "latent", "latent_tensor", "samples", "z")
_MAX_NAMES_SHOWN = 6

_COMFYUI_MARK = "latent_format_version_0"
"""A tensor of this name marks a ComfyUI file whose values are unscaled; without it they are multiplied by 0.18215."""
_OLD_COMFYUI_SCALE = 0.18215


def is_latent_file(path: str | Path) -> bool:
    """Whether the suffix is that of a tensor file."""
    return Path(path).suffix.lower() in LATENT_SUFFIXES


def is_always_raw(path: str | Path) -> bool:
    """Whether a file is ComfyUI's, which normalizes latents only inside its samplers, never on disk."""
    return Path(path).suffix.lower() == _COMFYUI_SUFFIX


def load_latents(path: str | Path, *, latent_width: int | None = None) -> Float[Tensor, "B C T H W"]:
    """Read the latents in a tensor file, as float32 on the CPU, in the scale that the file has.

    The file holds one tensor, a list of tensors of one size, or several by name, one of them called latents,
    latent, latent_tensor, samples or z. ComfyUI's `.latent` is such a file; if its format says that the values
    were multiplied by 0.18215, that is undone. Only tensors are unpickled.

    Args:
        latent_width: channels that the decoder expects. If given, the axes are checked, [1, C, H, W] is read as a
            single image, and [B, T, C, H, W] is recognised if only its third axis fits; otherwise
            [C, T, H, W] and [B, C, T, H, W] are assumed.
    Raises:
        MediaError: unreadable, no such tensor, axes that do not fit or are ambiguous, NaN or infinite
            values.
    """
    path = Path(path)
    stored = _pick(_read_tensors(path), path)
    latents = _channels_second(stored, latent_width, path).float()
    if not latents.numel():
        raise MediaError(f"{path}: the latents of shape {list(latents.shape)} are empty. Encode them again.")
    if not torch.isfinite(latents).all():
        raise MediaError(f"{path}: the latents hold NaN or infinite values. Encode them again.")
    if (largest := float(latents.abs().max())) > MAX_LATENT:
        raise MediaError(
            f"{path}: the latents hold values up to {largest:.2g}, while latents of video models reach about 10. "
            "Encode them again, or check how they were saved."
        )
    return latents.contiguous()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MediaError(
            f"{path} does not exist. Give the path of a latent file ({' '.join(sorted(LATENT_SUFFIXES))})."
        )
    try:
        if path.suffix.lower() == _COMFYUI_SUFFIX:
            return _undo_old_comfyui_scale(load_safetensors(path))
        if path.suffix.lower() == ".safetensors":
            return load_safetensors(path)
        if path.suffix.lower() == ".npy":
            return {"latents": _read_array(path)}
        content = load_pytorch(path)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror or error}). Check the file and its permissions."
        ) from error
    if isinstance(content, Tensor):
        return {"latents": content}
    if isinstance(content, list | tuple):
        return {"latents": _stack(content, path)}
    if isinstance(content, Mapping):
        return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    raise MediaError(
        f"{path} holds a {type(content).__name__}, not a tensor or a dict of tensors. Save the tensor alone."
    )


def _undo_old_comfyui_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    is_old = "latent_tensor" in tensors and _COMFYUI_MARK not in tensors
    if is_old and tensors["latent_tensor"].is_floating_point():
        return {"latents": tensors["latent_tensor"].float() / _OLD_COMFYUI_SCALE}
    return tensors


def _stack(items: list | tuple, path: Path) -> Tensor:
    """A list of latents of one size, as Wan's own code saves them, as a batch."""
    shapes = {tuple(item.shape) if isinstance(item, Tensor) else () for item in items}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise MediaError(
            f"{path} holds a list of {len(items)} items that are not all tensors [C, T, H, W] of one size. "
            "Save clips of different sizes in separate files."
        )
    return torch.stack(list(items))  # [B, C, T, H, W]


def _read_array(path: Path) -> Tensor:
    """A numpy array; its header is read first, and must not promise more than the file holds."""
    header = np.lib.format
    try:
        with open_regular(path) as file:
            version = header.read_magic(file)
            read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
            shape, _, dtype = read(file)
            if any(length < 0 for length in shape) or dtype.hasobject:
                raise ValueError(f"{dtype} of shape {shape}")
            num_bytes, held = dtype.itemsize * int(np.prod(shape, dtype=object)), path.stat().st_size - file.tell()
            if num_bytes > held:
                raise ValueError(f"its header promises {num_bytes} bytes of data, but the file holds {held}")
            file.seek(0)
            return torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, MediaError):
        raise
    except Exception as error:  # the header is Python text: a damaged one can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise MediaError(
            f"{path} cannot be read as a numpy array: {reason:.200}. Save it again with numpy.save, as numbers."
        ) from error


def _pick(tensors: dict[str, Tensor], path: Path) -> Tensor:
    for name in _NAMES:
        if name in tensors:
            return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    shown = ", ".join(f"{name:.60}" for name in list(tensors)[:_MAX_NAMES_SHOWN])
    shown += ", ..." if len(tensors) > _MAX_NAMES_SHOWN else ""
    raise MediaError(
        f"{path} holds {len(tensors)} tensors ({shown or 'none'}) and none is called {', '.join(_NAMES)}. "
        "Is it a checkpoint? Save the latents alone, or under the name latents."
    )


def _channels_second(latents: Tensor, latent_width: int | None, path: Path) -> Float[Tensor, "B C T H W"]:
    shape = list(latents.shape)
    if latents.ndim not in (4, 5) or not latents.is_floating_point():
        raise MediaError(
            f"{path} holds a {latents.dtype} tensor of shape {shape}, not latents of shape [C, T, H, W] or "
            "[B, C, T, H, W] in floating point. Save them like that."
        )
    if latent_width is None:
        return latents if latents.ndim == 5 else latents.unsqueeze(0)
    if latents.ndim == 4:
        return _with_both_axes(latents, latent_width, path)
    if shape[1] == latent_width:
        return latents
    if shape[2] == latent_width:
        return latents.transpose(1, 2)  # [B, T, C, H, W] to [B, C, T, H, W]
    raise _misfit(path, shape, latent_width)


def _with_both_axes(latents: Tensor, latent_width: int, path: Path) -> Float[Tensor, "B C T H W"]:
    """Four axes: a clip without a batch axis, or a single image without a time axis."""
    shape = list(latents.shape)
    first_fits, second_fits = (length == latent_width for length in shape[:2])
    if first_fits and not second_fits:
        return latents.unsqueeze(0)  # [C, T, H, W] to [1, C, T, H, W]
    if second_fits and shape[0] == 1:
        return latents.unsqueeze(2)  # [1, C, H, W] to [1, C, 1, H, W]
    if second_fits:
        count, *_, height, width = shape
        raise MediaError(
            f"{path}: latents of shape {shape} can be {count} images or one clip. Save images as "
            f"[{count}, {latent_width}, 1, {height}, {width}] (x.unsqueeze(2)), a clip as [1, {latent_width}, T, "
            f"{height}, {width}]."
        )
    raise _misfit(path, shape, latent_width)


def _misfit(path: Path, shape: list[int], latent_width: int) -> MediaError:
    return MediaError(
        f"{path}: latents of shape {shape} do not fit a decoder of {latent_width} latent channels. Give them as "
        f"[{latent_width}, T, H, W] or [B, {latent_width}, T, H, W], or choose the decoder they were made for."
    )
