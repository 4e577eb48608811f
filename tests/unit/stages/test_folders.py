"""Output folders that are filled at the end: whole, or as they were."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.stages.folders import filled_at_the_end, refuse_foreign_folder

MARKER = "report.json"


def fill(folder: Path, files: dict[str, str], *, interrupted_after: int | None = None) -> None:
    """Write the files into the folder's draft; Ctrl-C comes after some of them."""
    with filled_at_the_end(folder, MARKER) as draft:
        for index, (name, text) in enumerate(files.items()):
            if index == interrupted_after:
                signal.raise_signal(signal.SIGINT)
            (draft / name).write_text(text)
        assert not (folder / "b.txt").exists()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_folder_appears_whole_with_the_rights_of_new_folders(tmp_path: Path) -> None:
    files = {"a.txt": "1", "b.txt": "2", MARKER: "{}"}
    fill(tmp_path / "deep" / "out", files)
    assert contents(tmp_path / "deep" / "out") == files
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_folder_may_be_the_one_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path(), {"a.txt": "1", MARKER: "{}"})
    assert contents(tmp_path) == {"a.txt": "1", MARKER: "{}"}


@pytest.mark.parametrize("interrupted_after", [0, 1, 2])
def test_an_interrupt_leaves_no_folder_and_no_sibling(tmp_path: Path, interrupted_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", {"a.txt": "1", "b.txt": "2", MARKER: "{}"}, interrupted_after=interrupted_after)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_an_older_folder_as_it_was(tmp_path: Path) -> None:
    older = {"a.txt": "0", "mine.txt": "0", MARKER: "{}"}
    fill(tmp_path, older)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, {"a.txt": "1", "b.txt": "2", MARKER: "[]"}, interrupted_after=2)
    assert contents(tmp_path) == older
    fill(tmp_path, {"a.txt": "1", "b.txt": "2", MARKER: "[]"})
    assert contents(tmp_path) == {"a.txt": "1", "b.txt": "2", "mine.txt": "0", MARKER: "[]"}


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_stays_the_programs_own_when_the_moves_stop_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if again:
        fill(folder, {MARKER: "{}"})
    replace = Path.replace

    def stopping(path: Path, target: Path) -> Path:
        if any(folder.iterdir()) and target.name != "a.txt":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, {"a.txt": "1", "b.txt": "2", MARKER: "[]"})
    refuse_foreign_folder(folder, MARKER, force=False)
    (folder / MARKER).unlink()
    (folder / "mine.txt").write_text("")
    with pytest.raises(FlashVaedError, match="holds other files"):
        refuse_foreign_folder(folder, MARKER, force=False)
