"""Files and folders written whole or not at all, and what killed runs leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashvaed_cli.atomic import atomic_path, draft_folder, remove_leftovers, scratch_folder

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
