"""Where a command's words go may be closed, full or unable to show them: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from io import TextIOWrapper
from pathlib import Path

import pytest
from rich.table import Table

from flashvaed_cli.cli.app import main
from flashvaed_cli.cli.console import open_progress
from flashvaed_cli.cli.streams import prepare_streams
from tests.cli.test_interruption import put_in_place_of_stages
from tests.conftest import REPOSITORY


def broken_pipe() -> TextIOWrapper:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


class Result:
    """A result whose table holds what latin-1 and ASCII lack."""

    paths = (Path("p.safetensors"),)

    def table(self) -> Table:
        table = Table("größe 16×16 → ✓")
        table.add_row("ż")
        return table

    def as_dict(self) -> dict[str, object]:
        return {"size": "16×16 ż"}


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Run a command that only prints a result; returns its exit code."""
    put_in_place_of_stages(monkeypatch, lambda *_words, **_settings: Result())
    with pytest.raises(SystemExit) as ended:
        main(["prune", "-o", "p.safetensors", *flags])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(monkeypatch, *flags) == 0
        stream.flush()  # as Python does at its end


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    with sys.stdout:
        assert run(monkeypatch, *flags) == 0


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_full_stdout_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(monkeypatch, *flags) == 2
    assert "the files are written, but the result cannot be printed: No space left" in capsys.readouterr().err


def test_a_full_stdout_does_not_promise_files_that_nobody_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Result, "paths", ())
    with Path("/dev/full").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(monkeypatch) == 2
    assert capsys.readouterr().err.startswith("Error: the result cannot be printed: No space left")


def test_frames_are_not_decoded_into_a_closed_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    with sys.stdout, pytest.raises(SystemExit) as ended:
        main(["decode", "x.safetensors", "-o", "-"])
    assert ended.value.code == 2
    assert "standard output is closed" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    shown = tmp_path / "shown"
    with shown.open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        prepare_streams()
        assert run(monkeypatch) == 0
    text = shown.read_text(encoding=encoding)
    assert "16" in text and "?" in text and "wrote p.safetensors" in text


def test_work_goes_on_when_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with open_progress(quiet=False) as progress, progress.task("training", 2) as task:
            task.advance()
            progress.warn("not heard")
            progress.log("nor this")
        stream.flush()


def test_help_and_messages_whose_reader_left(tmp_path: Path) -> None:
    """Exit codes stay what they are: 1 would say that a condition of --require failed."""
    commands = [
        ("--help", 0),
        ("prune --help", 0),
        ("--version", 0),
        ("recipes", 0),
        ("recipes demo", 0),
        ("prune --nonsense", 2),
        ("prune --nonsense --json", 2),
        ("info missing", 2),
    ]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for words, exit_code in commands:
        command = [sys.executable, "-m", "flashvaed_cli", *words.split()]
        run = subprocess.run(command, check=False, cwd=tmp_path, env=environment, stdout=writer, stderr=writer)
        assert run.returncode == exit_code, words
    os.close(writer)


def test_a_reader_that_leaves_midway(tmp_path: Path) -> None:
    """What was read before is whole, and what is written later goes nowhere."""
    reader, writer = os.pipe()
    script = (
        "import os, sys\n"
        "from flashvaed_cli.cli.streams import prepare_streams\n"
        "prepare_streams()\n"
        "print('first', flush=True)\n"
        f"os.close({reader})\n"
        "print('second' * 10_000)\n"
        "print('third', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script]
    # The script holds the only reader: it leaves where the script says so.
    with subprocess.Popen(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, pass_fds=[reader], text=True
    ) as run:
        os.close(writer)
        os.close(reader)
        assert run.communicate()[1] == ""
    assert run.returncode == 0
