"""The store of activations: they come back as they were, and a full disk is one message."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import pytest
import torch

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.surgery.activations import ActivationStore


def test_tensors_come_back_and_the_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.randn(1, 3, 2, 4, 5)
    with ActivationStore("cpu") as store:
        store.save_input(0, "new", x)
        store.save_input(0, "new", x + 1)
        assert torch.equal(store.load_input(0, "new"), x + 1)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FlashVaedError, match="set TMPDIR to a folder with more"), ActivationStore("cpu") as store:
            store.save_input(0, "new", torch.zeros(1, 3, 4, 8, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
