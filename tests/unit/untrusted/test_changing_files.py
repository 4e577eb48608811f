"""A file that vanishes or is replaced between two openings is noticed, never read as half of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact import store
from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.errors import FlashVaedError, TensorFileError
from flashvaed_cli.untrusted import safetensors_file
from flashvaed_cli.untrusted.files import unchanging
from flashvaed_cli.untrusted.safetensors_file import load_safetensors
from tests.toy import write_toy_vae


def replace(path: Path) -> None:
    """Put another file in place, of the same size and the same time."""
    status = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def rewrite(path: Path) -> None:
    """Write into the file itself."""
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], None]] = {"replaced": replace, "rewritten": rewrite, "removed": Path.unlink}


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_change(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a")
    with unchanging(path, tmp_path / "missing"):
        path.read_text()
    with pytest.raises(TensorFileError, match=f"{path} was changed while it was read"), unchanging(path):
        CHANGES[change](path)
    path.write_text("a")

    def read() -> None:
        with unchanging(tmp_path):
            CHANGES[change](path)
            raise KeyError("what the reader made of it")

    with pytest.raises(TensorFileError, match="was changed while it was read"):
        read()


def test_an_error_about_an_unchanged_file_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="its own"), unchanging(tmp_path):
        raise KeyError("its own")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["between header and tensors", "between tensors and hash"])
def test_a_checkpoint_between_two_openings(
    change: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toy_vae(tmp_path / "vae.safetensors")
    load_checkpoint(path, builtins={})
    usual: Any = store.load_safetensors

    def changed(place: Path) -> Any:
        if when == "between header and tensors":
            CHANGES[change](place)
            return usual(place)
        tensors = usual(place)
        CHANGES[change](place)
        return tensors

    monkeypatch.setattr(store, "load_safetensors", changed)
    with pytest.raises(FlashVaedError, match=f"{path} was changed while it was read"):
        load_checkpoint(path, builtins={})


def test_tensors_between_index_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.ones(1, 4, 2, 2, 2)}, path)
    usual: Any = safetensors_file.read_index

    def changed(place: Path) -> Any:
        index = usual(place)
        replace(place)
        return index

    monkeypatch.setattr(safetensors_file, "read_index", changed)
    with pytest.raises(TensorFileError, match="was changed while it was read"):
        load_safetensors(path)
