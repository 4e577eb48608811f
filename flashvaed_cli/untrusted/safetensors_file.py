"""Safetensors files: the index, within limits, then the tensors that it promises. The index alone needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvaed_cli.errors import TensorFileError
from flashvaed_cli.limits import MAX_INDEX_BYTES, MAX_TENSORS
from flashvaed_cli.untrusted.files import open_regular, parse_json, unchanging

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "__metadata__"


@dataclass(frozen=True)
class SafetensorsIndex:
    """The header of a safetensors file.

    Attributes:
        shapes: of the tensors, by name.
        metadata: free text from whoever wrote the file.
        num_bytes: of the whole file, according to the index.
        start: where the tensors begin.
        entries: dtype, shape and place of the tensors as written there, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    num_bytes: int
    start: int
    entries: Mapping[str, Any]


class NotSafetensorsError(TensorFileError):
    """The file has no valid index of the safetensors format; `has_index`: it has one that is damaged or too large."""

    has_index = False


def read_index(path: Path) -> SafetensorsIndex:
    """The index of a safetensors file, whose tensors may be incomplete.

    Raises:
        NotSafetensorsError: no index of that format.
        TensorFileError: more than the limits allow, or not a regular file.
        OSError: as of `open`.
    """
    with open_regular(path) as file:
        head_bytes = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if start != b"{":
            raise NotSafetensorsError(f"{path}: not a safetensors file.")
        if head_bytes > MAX_INDEX_BYTES:
            raise _not_an_index(path, f"of {head_bytes} bytes, more than {MAX_INDEX_BYTES}")
        text = start + file.read(head_bytes - 1)
    if len(text) < head_bytes:
        raise _not_an_index(path, f"of {head_bytes} bytes, truncated after {len(text)}")
    try:
        index = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise _not_an_index(path, f"no JSON ({error})") from None
    num_tensors = len(index) - (_METADATA in index)
    if num_tensors > MAX_TENSORS:
        raise TensorFileError(f"{path}: {num_tensors} tensors, where at most {MAX_TENSORS} are read.")
    return _checked(index, path, 8 + head_bytes)


def _checked(index: dict[str, Any], path: Path, start: int) -> SafetensorsIndex:
    metadata = index.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _not_an_index(path, f"whose {_METADATA} is no mapping of texts")
    shapes, end = {}, 0
    for name, entry in index.items():
        try:
            first, last = map(_length, entry["data_offsets"])
            shapes[name] = tuple(map(_length, entry["shape"]))
        except (TypeError, KeyError, ValueError):
            raise _not_an_index(path, f"whose entry {name!r:.60} has no valid shape and data_offsets") from None
        if last < first or (math.prod(shapes[name]) > 0) != (last > first):
            raise _not_an_index(path, f"whose entry {name!r:.60} has a shape that does not fit its data_offsets")
        end = max(end, last)
    return SafetensorsIndex(shapes, metadata, start + end, start, index)


def _length(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a length")
    return value


def _not_an_index(path: Path, what: str) -> NotSafetensorsError:
    error = NotSafetensorsError(f"{path}: has an index {what}: damaged, or not a safetensors file. Copy it again.")
    error.has_index = True
    return error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        TensorFileError: as of `read_index`, or the tensors do not fit the index.
        OSError: as of `open`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with unchanging(path):
        index = read_index(path)
        size = path.stat().st_size
        if size < index.num_bytes:
            raise TensorFileError(
                f"{path}: truncated: its index promises {index.num_bytes} bytes and the file has {size}. "
                "Copy or download it again."
            )
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise TensorFileError(
                f"{path}: cannot read its tensors: {error!s:.300}. Copy or download it again."
            ) from error
