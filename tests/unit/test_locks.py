from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.locks import exclusive_lock

HOLD = """
import sys, time
from pathlib import Path
from flashvaed_cli.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), ValueError):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with exclusive_lock(path, FlashVaedError):
        with pytest.raises(FlashVaedError, match=rf"^process {os.getpid()} on "), exclusive_lock(path, FlashVaedError):
            pytest.fail("two hold it")
        assert path.exists()  # the refused one has not removed it
    assert not path.exists()
    with exclusive_lock(path, FlashVaedError):
        pass


def test_an_error_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with pytest.raises(KeyboardInterrupt), exclusive_lock(path, FlashVaedError):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_a_file_that_locks_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(FlashVaedError, match=rf"process {holder.pid} on "), exclusive_lock(path, FlashVaedError):
        pytest.fail("two hold it")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert path.exists()
    with exclusive_lock(path, FlashVaedError):
        assert path.read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")


def test_a_link_or_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (tmp_path / ".link.lock").symlink_to(victim)
    os.mkfifo(tmp_path / ".pipe.lock")
    (tmp_path / ".folder.lock").mkdir()
    for name in (".link.lock", ".pipe.lock", ".folder.lock", "victim.txt"):
        with (
            pytest.raises(FlashVaedError, match="is named like a flashvaed lock file"),
            exclusive_lock(tmp_path / name, FlashVaedError),
        ):
            pytest.fail(f"{name} is taken for a lock")
    assert victim.read_text() == "precious" and (tmp_path / ".link.lock").is_symlink()


def test_a_file_that_its_holder_removes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens the file and locks it after the holder has removed it would lock a file that nobody else sees."""
    path, opened = tmp_path / ".lock", os.open

    def removed_after_opening(place: Path, *arguments: int) -> int:
        descriptor = opened(place, *arguments)
        monkeypatch.undo()
        place.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed_after_opening)
    with (
        exclusive_lock(path, FlashVaedError),
        pytest.raises(FlashVaedError),
        exclusive_lock(path, FlashVaedError),
    ):
        pytest.fail("two hold it")
