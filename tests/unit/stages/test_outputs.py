"""Output folders that are filled at the end: whole, or as they were."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.ownership import HEADER_KEY
from flashvaed_cli.stages.common.outputs import claim_file, claim_folder, filled_at_the_end

MARKER = "report.json"
OURS, OURS_LATER = '{"kind": "flashvaed-evaluation"}', '{"kind": "flashvaed-evaluation", "schema": 2}'


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
    files = {"a.txt": "1", "b.txt": "2", MARKER: OURS}
    fill(tmp_path / "deep" / "out", files)
    assert contents(tmp_path / "deep" / "out") == files
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_folder_may_be_the_one_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path(), {"a.txt": "1", MARKER: OURS})
    assert contents(tmp_path) == {"a.txt": "1", MARKER: OURS}


@pytest.mark.parametrize("interrupted_after", [0, 1, 2])
def test_an_interrupt_leaves_no_folder_and_no_sibling(tmp_path: Path, interrupted_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", {"a.txt": "1", "b.txt": "2", MARKER: OURS}, interrupted_after=interrupted_after)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_an_older_folder_as_it_was(tmp_path: Path) -> None:
    older = {"a.txt": "0", "mine.txt": "0", MARKER: OURS}
    fill(tmp_path, older)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, {"a.txt": "1", "b.txt": "2", MARKER: OURS_LATER}, interrupted_after=2)
    assert contents(tmp_path) == older
    fill(tmp_path, {"a.txt": "1", "b.txt": "2", MARKER: OURS_LATER})
    assert contents(tmp_path) == {"a.txt": "1", "b.txt": "2", "mine.txt": "0", MARKER: OURS_LATER}


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_stays_the_programs_own_when_the_moves_stop_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if again:
        fill(folder, {MARKER: OURS})
    replace = Path.replace

    def stopping(path: Path, target: Path) -> Path:
        if any(folder.iterdir()) and target.name != "a.txt":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, {"a.txt": "1", "b.txt": "2", MARKER: OURS_LATER})
    claim_folder(folder, MARKER, force=False)
    (folder / MARKER).unlink()
    (folder / "mine.txt").write_text("")
    with pytest.raises(FlashVaedError, match="holds other files"):
        claim_folder(folder, MARKER, force=False)


@pytest.mark.parametrize("foreign", ["{}", "[]", "not JSON", '{"kind": "other"}', "[" * 100_000])
def test_a_marker_of_something_else_makes_no_folder_ours(tmp_path: Path, foreign: str) -> None:
    (tmp_path / MARKER).write_text(foreign)
    with pytest.raises(FlashVaedError, match="holds other files"):
        claim_folder(tmp_path, MARKER, force=False)
    claim_folder(tmp_path, MARKER, force=True)


def test_nothing_is_written_through_a_linked_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "export", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / MARKER).write_text(OURS)
    (folder / "diffusers").symlink_to(elsewhere)
    with pytest.raises(FlashVaedError, match="diffusers is a link to another folder"):
        claim_folder(folder, MARKER, force=True)


def test_a_folder_never_takes_the_place_of_what_was_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    fill(folder, {MARKER: OURS, "clip.mp4": "mine"})
    with (
        pytest.raises(FlashVaedError, match=r"clip\.mp4 is read, and would be replaced"),
        filled_at_the_end(folder, MARKER, reads=[folder / "clip.mp4"]) as draft,
    ):
        (draft / "clip.mp4").write_text("theirs")
    assert (folder / "clip.mp4").read_text() == "mine"


def test_a_parent_that_vanishes_is_one_message(tmp_path: Path) -> None:
    def write_into_nothing() -> None:
        with filled_at_the_end(tmp_path / "parent" / "out", MARKER) as draft:
            shutil.rmtree(tmp_path / "parent")
            (draft / "a.txt").write_text("1")

    with pytest.raises(FlashVaedError, match="parent has vanished while"):
        write_into_nothing()


def test_files_that_a_library_made_private_get_the_usual_rights(tmp_path: Path) -> None:
    with filled_at_the_end(tmp_path / "out", MARKER) as draft:
        (draft / "a.txt").touch(mode=0o600)
    (tmp_path / "usual").touch()
    assert (tmp_path / "out" / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_input_is_replaced_with_force_only_however_it_is_spelled(tmp_path: Path) -> None:
    source = tmp_path / "flash.safetensors"
    save_file({"w": torch.zeros(1)}, source, metadata={HEADER_KEY: "{}"})
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "hard.safetensors").hardlink_to(source)
    for name in ("flash.safetensors", "link.safetensors", "hard.safetensors", f"../{tmp_path.name}/flash.safetensors"):
        with pytest.raises(FlashVaedError, match="is the input itself"):
            claim_file(tmp_path / name, force=False, reads=[None, "builtin:tiny-wan", str(source)])
        claim_file(tmp_path / name, force=True, reads=[str(source)])
    claim_file(source, force=False, reads=["builtin:tiny-wan"])


def test_what_is_in_the_way_of_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "foreign.safetensors").write_text("precious")
    (tmp_path / "log.jsonl").write_text("mine\n")
    for place, message in {
        tmp_path: "is a folder",
        tmp_path / "pipe": "is a device, a pipe or a socket",
        Path("/dev/null"): "is a device, a pipe or a socket",
        tmp_path / "foreign.safetensors": "was not written by flashvaed",
        tmp_path / "foreign.safetensors" / "x": "is a file, not a folder",
        Path("~nobody-of-this-name/x"): "there is no home folder",
        tmp_path / ("n" * 300): "too long",
        Path("/proc/flash.safetensors"): "cannot write to /proc",
    }.items():
        with pytest.raises(FlashVaedError, match=message):
            claim_file(place, force=False)
    with pytest.raises(FlashVaedError, match=r"log\.jsonl exists and was not written by flashvaed"):
        claim_file(tmp_path / "new.safetensors", force=False, beside=[tmp_path / "log.jsonl"])
    claim_file(tmp_path / "new.safetensors", force=True, beside=[tmp_path / "log.jsonl"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.safetensors", "log.jsonl", "pipe"]
