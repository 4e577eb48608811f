"""Which files of a diffusers folder hold the weights: one file or shards, of full precision or of a variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from flashvaed_cli.errors import ArtifactError, TensorFileError
from flashvaed_cli.limits import MAX_CONFIG_BYTES, MAX_SHARDS
from flashvaed_cli.untrusted.files import parse_json, read_bounded

STEM = "diffusion_pytorch_model"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Variants in order of preference: full precision, then the half precision with the range of float32.
_VARIANTS = ("", "fp32", "bf16", "fp16")
_FORMATS = (".safetensors", ".bin")


def weight_files(folder: Path, wanted: str | None = None) -> tuple[list[Path], str]:
    """The file or shards to read, and the name of their variant ("" for none).

    diffusers names them `STEM[.VARIANT].safetensors`, or by an index `STEM.safetensors.index[.VARIANT].json` (older:
    `STEM[.VARIANT].safetensors.index.json`); `.bin` likewise. Safetensors come first, then full precision.

    Args:
        wanted: a variant to take if it is there.
    Raises:
        ArtifactError: no weights, several without a known name, shards missing or outside the folder.
    """
    found = _candidates(folder)
    if found:
        named = [item for item in found if wanted and item[0] == wanted]
        variant, path = (named or found)[0]
        return (_shards(folder, path) if path.suffix == ".json" else [path]), variant
    others = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    chosen = [path for path in others if path.suffix == SUFFIXES[0]] or others
    if len(chosen) == 1:
        return chosen, ""
    listed = ", ".join(path.name for path in others[:20]) or "none"
    raise ArtifactError(f"{folder}: no {STEM}.safetensors (weights files there: {listed}). Give one file by its path.")


def _candidates(folder: Path) -> list[tuple[str, Path]]:
    """Each variant with its file or index of shards, in order of preference."""
    ranked: list[tuple[tuple[int, int, str, bool], str, Path]] = []
    for path in folder.iterdir():
        name = path.name
        suffix = next((suffix for suffix in _FORMATS if suffix in name), None)
        if suffix is None or not path.is_file():
            continue
        stem, _, end = name.partition(suffix)
        index = re.fullmatch(r"\.index(?:\.([\w-]+))?\.json", end)
        if (end and index is None) or (not end and (_SHARD.search(stem) or not stem.startswith(STEM))):
            continue
        variant = (index[1] if index else None) or stem.removeprefix(STEM).strip(".")
        if index and not stem.startswith(STEM):
            variant = index[1] or ""
        place = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
        ranked.append(((_FORMATS.index(suffix), place, variant, index is None), variant, path))
    return [(variant, path) for _, variant, path in sorted(ranked)]


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArtifactError(f"{index}: weight_map is not a mapping of tensors to file names. Download it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name in ("", ".", ".."):
            raise ArtifactError(
                f"{index}: names the shard {name!r:.80}, outside its folder. Shards lie beside their index."
            )
    if len(names) > MAX_SHARDS:
        raise ArtifactError(f"{index}: names {len(names)} shards, where at most {MAX_SHARDS} are read.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        listed = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        raise ArtifactError(f"{folder}: {index.name} names shards that are not there: {listed or 'none'}.")
    return [folder / name for name in names]


def read_config(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ArtifactError: unreadable, too large, nested too deep, or not an object.
    """
    try:
        config = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    except TensorFileError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config
