"""Artifact files: one safetensors file with tensors and header, written atomically."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.artifact.file_kinds import kind_of_file
from flashvaed_cli.artifact.header import NO_CONTENT, ArtifactHeader, canonical_json, dump_header, parse_header
from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.ownership import HEADER_KEY, has_own_header
from flashvaed_cli.untrusted.files import open_regular, parse_json, unchanging
from flashvaed_cli.untrusted.safetensors_file import NotSafetensorsError, load_safetensors, read_index

_CHUNK_BYTES = 1 << 20


def write_artifact(
    path: str | Path, tensors: Mapping[str, Tensor], header: ArtifactHeader, *, force: bool = False
) -> None:
    """Write one artifact, atomically. Equal tensors and headers give equal bytes.

    Args:
        tensors: any device and layout; dtypes are kept.
        force: also replace a file that flashvaed did not write.
    Raises:
        ArtifactError: another program wrote the file and `force` is not set, or it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not force and not has_own_header(path):
        raise ArtifactError(
            f"{path} exists and was not written by flashvaed. Choose another name, or replace it with --force."
        )
    plain = _plain_tensors(tensors)
    try:
        with atomic_path(path) as sibling:
            save_file(plain, sibling, metadata={HEADER_KEY: dump_header(header)})
    except OSError as error:
        size_mb = sum(tensor.nbytes for tensor in plain.values()) / 1e6
        raise ArtifactError(
            f"cannot write {path} ({size_mb:.1f} MB): {error.strerror}. "
            "What was there before is untouched; free some space or choose another place with --output."
        ) from error


def read_artifact(path: str | Path) -> tuple[ArtifactHeader, dict[str, Tensor]]:
    """The header and all tensors, with the dtypes of the file.

    Raises:
        ArtifactError: not an artifact, truncated, damaged or of a newer schema.
    """
    with unchanging(Path(path)):
        header = read_header(path)
        try:
            return header, load_safetensors(Path(path))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot read its tensors: {error}. Write or copy it again.") from error


def read_header(path: str | Path) -> ArtifactHeader:
    """The header alone; reads no tensor, but notices a truncated file.

    Raises:
        ArtifactError: not an artifact, truncated, damaged or of a newer schema.
    """
    metadata = read_metadata(path)
    if HEADER_KEY not in metadata:
        raise ArtifactError(
            f"{path}: a safetensors file without a flashvaed header, so not a flashvaed artifact. "
            "If it is a VAE checkpoint, give it where a checkpoint is expected."
        )
    return parse_header(metadata[HEADER_KEY], str(path))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file.

    Raises:
        ArtifactError: missing, not safetensors, truncated, or more than the limits allow.
    """
    path = Path(path)
    try:
        index, size = read_index(path), path.stat().st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from error
    except NotSafetensorsError as error:
        raise _not_safetensors(path, error) from None
    if size < index.num_bytes:
        raise ArtifactError(
            f"{path}: truncated: its index promises {index.num_bytes} bytes and the file has {size}. "
            "Copy or download it again."
        )
    return dict(index.metadata)


def _not_safetensors(path: Path, error: NotSafetensorsError) -> ArtifactError:
    if kind := kind_of_file(path):
        return ArtifactError(
            f"{path}: {kind}, not a safetensors file. Give a checkpoint of a VAE, or an artifact of flashvaed."
        )
    if error.has_index:
        return error
    return ArtifactError(
        f"{path}: not a safetensors file, or truncated within its index ({path.stat().st_size} bytes). "
        "Check the path, or copy it again."
    )


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous, on the CPU, no two sharing memory: what safetensors takes."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous()
        if flat.untyped_storage().data_ptr() in seen:
            flat = flat.clone(memory_format=torch.contiguous_format)
        seen.add(flat.untyped_storage().data_ptr())
        plain[name] = flat
    return plain


def sha256_of_files(files: Sequence[Path]) -> str:
    """One SHA-256 for a checkpoint: that of its file, or of the list of names and hashes if there are several."""
    if len(files) == 1:
        return content_sha256(files[0])
    lines = sorted(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_sha256(path: str | Path) -> str:
    """What identifies a file: for an artifact, the SHA-256 of its tensors and of what its header says about them.

    How and when an artifact was made does not count: the same work gives the same hash. Other files, and artifacts of
    version 0.3 and older, are identified by the SHA-256 of the whole file.
    """
    path = Path(path)
    if not has_own_header(path):
        return sha256_of(path)
    index = read_index(path)
    header = parse_json(index.metadata[HEADER_KEY])
    if not isinstance(header, dict) or "run" not in header:
        return sha256_of(path)
    content = {key: value for key, value in header.items() if key not in NO_CONTENT}
    digest = hashlib.sha256(canonical_json({"header": content, "tensors": index.entries}).encode())
    with open_regular(path) as file:
        file.seek(index.start)
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in chunks, as hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(Path(path)) as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
