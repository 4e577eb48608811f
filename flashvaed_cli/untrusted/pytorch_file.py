"""PyTorch files (`.pth`, `.pt`, `.ckpt`, `.bin`): read without running their code, and within limits."""

from __future__ import annotations

import errno
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from torch import Tensor

from flashvaed_cli.errors import TensorFileError
from flashvaed_cli.limits import MAX_PICKLE_BYTES, MAX_TENSOR_REUSE, MAX_TENSORS
from flashvaed_cli.untrusted.files import open_regular
from flashvaed_cli.untrusted.pickle_scan import scan_pickle

_MAGIC_PARTS = 5
"""Pickles at the start of a file from before PyTorch 1.6: a magic number, a version, the system, the content, keys."""
_END, _END64 = b"PK\x05\x06", b"PK\x06\x06"
_END_BYTES = 65_536 + 22


def load_pytorch(path: Path, *, mapped: bool = True) -> object:
    """What torch.save wrote: a tensor, or dicts, lists and tuples of tensors, numbers and texts.

    Args:
        mapped: the tensors' data stay on disk until used.
    Raises:
        TensorFileError: it could run code, is damaged, or is more than the limits allow: too many tensors, tensors
            that fill more memory than the file (expanded), sparse tensors, compressed records.
        OSError: as of `open`.
    """
    try:
        with open_regular(path) as file:
            _scan(file, path)
        content = _load(path, mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise TensorFileError(
            f"{path}: not a plain file of weights: reading it could run code, which flashvaed never does. "
            "If you trust it, load it in PyTorch and save its state dict as safetensors. "
            f"(torch: {reason:.200})"
        ) from error
    except TensorFileError:
        raise
    except Exception as error:  # a damaged pickle can raise anything, an archive with odd offsets EINVAL
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise TensorFileError(
            f"{path}: cannot be read as a PyTorch file ({type(error).__name__}: {str(error).strip():.200}). "
            "It is damaged, truncated or in another format: copy or download it again."
        ) from error
    _check_tensors(content, path)
    return content


def _load(path: Path, mapped: bool) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; all that matters is whether it can be read
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6


def _scan(file: BinaryIO, path: Path) -> None:
    size = path.stat().st_size
    if file.read(2) != b"PK":
        file.seek(0)
        for _ in range(_MAGIC_PARTS):
            if file.tell() < size:
                scan_pickle(file, path, size)
        return
    _check_directory(file, path, size)
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record.file_size for record in archive.infolist()}
        if sum(records.values()) > size:
            raise TensorFileError(
                f"{path}: compressed, to {sum(records.values())} bytes from {size}: torch.save writes no such file. "
                "Save it again with PyTorch."
            )
        pickles = [name for name in records if PurePosixPath(name).name == "data.pkl"]
        for name in pickles:
            if records[name] > MAX_PICKLE_BYTES:
                raise TensorFileError(
                    f"{path}: its pickle has {records[name]} bytes, where at most {MAX_PICKLE_BYTES} are read. "
                    "Save the VAE's state dict alone."
                )
            scan_pickle(io.BytesIO(archive.read(name)), path, _storages(records, name))


def _storages(records: Mapping[str, int], pickle_name: str) -> dict[str, int]:
    folder = f"{PurePosixPath(pickle_name).parent}/data/"
    return {name.removeprefix(folder): size for name, size in records.items() if name.startswith(folder)}


def _check_directory(file: BinaryIO, path: Path, size: int) -> None:
    """Raise if the archive's list of files is too long, since it is read at once."""
    file.seek(max(0, size - _END_BYTES))
    tail = file.read(_END_BYTES)
    place = tail.rfind(_END)
    count, num_bytes = struct.unpack_from("<HI", tail, place + 10) if 0 <= place <= len(tail) - 22 else (0, 0)
    place64 = tail.rfind(_END64)
    if 0 <= place64 <= len(tail) - 48:
        count, num_bytes = struct.unpack_from("<QQ", tail, place64 + 32)
    file.seek(0)
    if count > 2 * MAX_TENSORS or num_bytes > MAX_PICKLE_BYTES:
        raise TensorFileError(f"{path}: {count} files in one archive, where at most {2 * MAX_TENSORS} are read.")


def _check_tensors(content: object, path: Path) -> None:
    """Raise unless the tensors are dense, and together not much larger than the file."""
    limit = MAX_TENSOR_REUSE * path.stat().st_size
    total = 0
    for number, tensor in enumerate(_tensors_in(content), start=1):
        if number > MAX_TENSORS:
            raise TensorFileError(f"{path}: more than {MAX_TENSORS} tensors are not read.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise TensorFileError(
                f"{path}: holds a sparse, nested, quantised or empty tensor; only plain dense tensors are read."
            )
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        if num_bytes > tensor.untyped_storage().nbytes() or total > limit:
            raise TensorFileError(
                f"{path}: a tensor of shape {list(tensor.shape)} would fill {num_bytes} bytes from "
                f"{tensor.untyped_storage().nbytes()} in the file (it repeats its values). Save it with .contiguous()."
            )


def _tensors_in(content: object) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples, once each; containers may contain themselves."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, Mapping) else item
