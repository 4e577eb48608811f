"""Files and folders written whole or not at all, and what killed runs leave."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.atomic import atomic_path, draft_folder, remove_leftovers, scratch_folder
from flashvaed_cli.errors import FlashVaedError

WRITE = """
import sys, time
from pathlib import Path
from flashvaed_cli.atomic import atomic_path, draft_folder, scratch_folder
with atomic_path(Path(sys.argv[1])), draft_folder(Path(sys.argv[2])) as draft, scratch_folder("test"):
    (draft / "half").write_text("1")
    print("writing", flush=True)
    time.sleep(60)
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_leftovers_of_a_killed_run_go_and_those_of_a_living_one_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    file, folder = tmp_path / "flash.safetensors", tmp_path / "report"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(file), str(folder)], stdout=subprocess.PIPE, env={**os.environ}
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    (tmp_path / ".flash.mine").touch()
    for output in (file, folder):
        remove_leftovers(output)
    with scratch_folder("test"):
        assert len(list(scratch.iterdir())) == 2
    assert len(hidden(tmp_path)) == 3
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    for output in (file, folder):
        remove_leftovers(output)
    with scratch_folder("test"):
        assert len(list(scratch.iterdir())) == 1
    assert hidden(tmp_path) == [".flash.mine"]


def test_a_link_is_written_through_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_path(link) as sibling:
        sibling.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    link.unlink()
    link.symlink_to(tmp_path / "disk" / "missing.txt")
    with atomic_path(link) as sibling:
        sibling.write_text("first")
    assert link.is_symlink() and (tmp_path / "disk" / "missing.txt").read_text() == "first"


def test_names_of_any_length_have_room_for_the_sibling(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".txt")
    with atomic_path(path) as sibling:
        sibling.write_text("1")
    assert path.read_text() == "1" and not hidden(tmp_path)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), draft_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "out.txt"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_safetensors(path: Path) -> None:
    save_file({"w": torch.zeros(1000)}, path)


def save_with_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(torch.zeros(1000), file)


def save_with_python(path: Path) -> None:
    path.write_bytes(bytes(4000))


SAVERS = [save_with_safetensors, save_with_torch, save_with_python]


@pytest.mark.parametrize("save", SAVERS)
def test_a_full_disk_is_an_oserror_of_the_place_asked_for(tmp_path: Path, save: Callable[[Path], None]) -> None:
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"

    def write(place: AbstractContextManager[Path], name: str) -> None:
        with place as path:
            save(path / name)

    for place, name in ((atomic_path(file), ""), (draft_folder(folder), "x.safetensors")):
        with full_disk(), pytest.raises(OSError) as raised:
            write(place, name)
        assert raised.value.errno == errno.EFBIG
        assert raised.value.filename == str(file if name == "" else folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
def test_a_full_tmpdir_is_one_message(
    tmp_path: Path, save: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (
        full_disk(),
        pytest.raises(FlashVaedError, match=f"cannot write to {tmp_path}: File too large. .*TMPDIR"),
        scratch_folder("test") as folder,
    ):
        save(folder / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch_folder("test"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(RuntimeError, match="another"), atomic_path(tmp_path / "x"):
        raise RuntimeError("another")


def test_what_a_killed_run_left_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    target = tmp_path / "flash.phase1.ckpt"
    (tmp_path / ".flash.phase1.partial-dead.ckpt").touch()
    (tmp_path / ".flash.phase2.partial-other.ckpt").touch()
    with atomic_path(target) as sibling:
        sibling.write_bytes(b"new")
    assert hidden(tmp_path) == [".flash.phase2.partial-other.ckpt"]


def test_an_error_of_the_disk_inside_that_of_a_library_is_an_oserror(tmp_path: Path) -> None:
    target = tmp_path / "flash.phase1.ckpt"
    with pytest.raises(OSError, match="Input/output error") as caught, atomic_path(target):  # noqa: PT012
        try:
            raise OSError(errno.EIO, "Input/output error")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert caught.value.filename == str(target) and not any(tmp_path.iterdir())
