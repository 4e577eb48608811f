"""Machines without a home folder, without /dev/shm, without room for temporary files."""

from __future__ import annotations

import errno
import os
import pwd
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from flashvaed_cli.atomic import scratch_folder
from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.media.workers import FileWorkers
from flashvaed_cli.metrics.autotune import Choice, choice_file, remembered_choice
from flashvaed_cli.metrics.lpips_metric import load_lpips
from tests.commands import CALIBRATION, TRAINING, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae

SPEED = "eval vae.safetensors --speed --autotune --sizes 16x16 --frames 5 --num-speed-rounds 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    return folder


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user whom it does not know."""

    def unknown(number: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "FLASHVAED_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
def test_no_home(folder: Path) -> None:
    result = succeed(f"{SPEED} -o speed", cwd=folder)
    assert "could not be remembered: there is no home folder" in " ".join(str(result).split())
    with pytest.raises(FileNotFoundError, match="no home folder, nor XDG_CACHE_HOME"):
        choice_file("key")
    assert not (folder / "~").exists()
    result = invoke("info ~/vae.safetensors", cwd=folder)
    assert result.exit_code == 2 and "there is no home folder ~ here" in result.stderr


def test_a_home_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "home").touch()  # a file: root may write anywhere else
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in ("FLASHVAED_CACHE", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    result = succeed(f"{SPEED} --force -o speed", cwd=folder)
    place = choice_file("key")
    assert f"It could not be remembered in {place.parent}" in " ".join(str(result).split())
    assert ": Not a directory" in str(result) and remembered_choice(place, "key") is None
    with pytest.raises(MetricUnavailableError, match="could not be fetched: NotADirectoryError"):
        load_lpips(allow_download=True)


def test_no_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Semaphores are files in /dev/shm: the processes that read clips need some."""

    def refuse(*_words: object, **_settings: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    distill = f"distill vae.safetensors --phase 3 --num-steps 1 --data clip.mp4 {TRAINING} --num-workers 2"
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    result = invoke(f"{distill} --quiet -o f.safetensors", cwd=folder)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert told.count("Warning: no decoding processes: they need a writable /dev/shm") == 1
    assert "Clips are read one by one" in told
    with pytest.warns(UserWarning, match="no decoding processes"), FileWorkers(2) as workers:
        assert list(workers.map(abs, [-1, 2], str)) == [(-1, 1), (2, 2)]


def test_no_place_for_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    result = invoke(f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION} -o p.safetensors -q", cwd=folder)
    assert result.exit_code == 2
    assert result.stderr.count("Error:") == 1
    assert "no folder for temporary files is writable. Set TMPDIR to one that is." in " ".join(result.stderr.split())
    assert not (folder / "p.safetensors").exists()


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_useless_tmpdir_is_passed_over(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "t"
    if kind == "a file":
        place.touch()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch_folder("test") as folder:
        assert folder.is_dir() and tmp_path not in folder.parents


def test_a_full_tmpdir_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_words: object, **_settings: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flashvaed_cli.surgery.activations.save_file", full)
    result = invoke(f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION} -o p.safetensors -q", cwd=folder)
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert f"cannot write to {tempfile.gettempdir()}: No space left on device" in told and "set TMPDIR" in told
    assert not (folder / "p.safetensors").exists()


def test_what_was_chosen_is_remembered_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FLASHVAED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    place = choice_file("key")
    assert place.parent == tmp_path / ".cache" / "flashvaed" / "autotune"
    place.parent.mkdir(parents=True)
    place.write_text('{"key": "key", "choice": {"chunk": 2}}')
    assert remembered_choice(place, "key") == Choice(chunk=2)


@pytest.mark.usefixtures("no_home")
def test_commands_that_encode_need_no_home(folder: Path) -> None:
    succeed(f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION} -o homeless.safetensors -q", cwd=folder)


@pytest.mark.parametrize("at", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_no_error(
    folder: Path, at: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHVAED_CACHE", str(tmp_path / at))
    words = f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION} -q -o {tmp_path}/pruned.safetensors"
    result = invoke(words, cwd=folder)
    assert result.exit_code == 0 and str(tmp_path / at) not in result.stderr and "Error" not in result.stderr
