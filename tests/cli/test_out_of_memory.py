"""Running out of memory is one message that names what needs less, in every command."""

from __future__ import annotations

import errno
from typing import NoReturn

import pytest
import torch
from typer.testing import CliRunner

from flashvaed_cli.cli.app import app
from flashvaed_cli.errors import is_out_of_memory
from flashvaed_cli.stages.common.run import Run

ERRORS = {
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "onednn": RuntimeError("could not create a memory object"),
    "onednn's code": RuntimeError("could not create a primitive"),
    "kernel": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
FLAGS = {
    "analyze": "--max-side",
    "prune": "--crop-size",
    "convert-ops": "--crop-size",
    "distill": "--batch-size",
    "eval": "--max-memory, --tile",
    "export": "or use a machine with more",
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("command", FLAGS)
def test_one_message(command: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def fail(*_args: object, **_kwargs: object) -> NoReturn:
        raise ERRORS[kind]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "load", fail)
    monkeypatch.setattr(Run, "load_alone", fail)
    result = CliRunner().invoke(app, [command, "builtin:tiny-wan"])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("out of memory: ") == 1
    assert FLAGS[command] in " ".join(result.stderr.replace("│", " ").split())
    assert ("the GPU is full" in " ".join(result.stderr.split())) == (kind in ("cuda", "cublas"))
    assert list(tmp_path.glob("*.safetensors")) == []


def test_other_errors_are_none() -> None:
    unsupported = RuntimeError(
        "could not create a primitive descriptor for a convolution forward propagation primitive"
    )
    for error in (
        unsupported,
        RuntimeError("shape mismatch"),
        OSError(errno.ENOSPC, "No space"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(error)
