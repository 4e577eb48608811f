"""Two runs on one output: the second is told, and both outputs are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashvaed_cli.cli.app import app
from flashvaed_cli.cli.output_lock import lock_path, only_run
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.stages.common.outputs import filled_at_the_end
from tests.commands import put_in_place_of_stages

OUTPUTS = {
    "analyze": "a.safetensors",
    "prune": "p.safetensors",
    "convert-ops": "c.safetensors",
    "distill": "f.safetensors",
    "eval": "report",
    "export": "export",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_the_second_run_is_told_who_writes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = OUTPUTS[command]
    words = [command, "--quiet", "-o", output]

    def first(*_words: object, **_settings: object) -> None:
        put_in_place_of_stages(monkeypatch, second)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        told = " ".join(result.stderr.split())
        assert told.startswith(f"Error: another run is writing {output} (process {os.getpid()} on "), told
        assert told.endswith("give this one another --output.")
        raise FlashVaedError("the first ends")

    def second(*_words: object, **_settings: object) -> None:
        raise AssertionError("two runs at once")

    put_in_place_of_stages(monkeypatch, first)
    assert "the first ends" in CliRunner().invoke(app, words).stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_one_output_share_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    places = [Path("real.safetensors"), tmp_path / "real.safetensors", Path("link.safetensors")]
    assert {lock_path(place) for place in places} == {tmp_path.resolve() / ".real.safetensors.lock"}
    assert lock_path(Path("new/report")) == tmp_path.resolve() / ".new-report.lock"
    assert lock_path(Path()).parent == tmp_path.resolve().parent
    assert len(lock_path(Path("ż" * 127)).name.encode()) <= 255


def test_where_nothing_can_be_locked_nobody_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with only_run(str(tmp_path / "file" / "p.safetensors")), only_run("/proc/none/p.safetensors"), only_run(None):
        pass


def test_a_folder_that_another_program_makes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two programs that use the package do it, beside its command line: neither is refused, and both are whole."""
    usual = Path.rename

    def rename(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", usual)
        fill("other")
        return usual(path, target)

    def fill(word: str) -> None:
        with filled_at_the_end(tmp_path / "out", "marker.json", force=True) as draft:
            for name in ("marker.json", "b.txt", f"{word}.txt"):
                (draft / name).write_text(word)

    monkeypatch.setattr(Path, "rename", rename)
    fill("one")
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {"marker.json": "one", "b.txt": "one", "one.txt": "one", "other.txt": "other"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
