"""Ctrl-C and SIGTERM in every command: one message that says what was written, and the exit code of the signal."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from flashvaed_cli.cli.app import app
from flashvaed_cli.cli.interruption import OutputWatch, Terminated, signals_raise
from flashvaed_cli.errors import ExportError
from flashvaed_cli.recipe import COMMAND_RECIPES
from tests.commands import put_in_place_of_stages

SIGNALS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "the terminal was closed"),
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", COMMAND_RECIPES)
def test_a_signal_in_a_stage(
    command: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(recipe: Any, **_settings: object) -> None:
        os.kill(os.getpid(), number)

    put_in_place_of_stages(monkeypatch, stage)
    handler = signal.getsignal(signal.SIGTERM)
    exit_code, name = SIGNALS[number]
    result = CliRunner().invoke(app, [command, "--quiet", "--output", str(tmp_path / "mine")])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr == f"Error: {name}: nothing was written to {tmp_path / 'mine'}\n"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_was_written_before_the_signal_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(recipe: Any, **_settings: object) -> None:
        Path(recipe.output).write_text("whole", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGTERM)

    put_in_place_of_stages(monkeypatch, stage)
    result = CliRunner().invoke(app, ["prune", "-o", str(tmp_path / "p.safetensors")])
    assert result.exit_code == 143
    assert f"terminated: {tmp_path / 'p.safetensors'} was written, but files that belong to it may be missing" in (
        result.stderr.replace("\n", "")
    )


def test_notes_of_a_stage_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(recipe: Any, **_settings: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            error.add_note("half of it is kept")
            raise

    put_in_place_of_stages(monkeypatch, stage)
    result = CliRunner().invoke(app, ["distill", "-q", "-o", "f.safetensors"])
    assert result.stderr == "Error: terminated: nothing was written to f.safetensors; half of it is kept\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_a_library_makes_another_error(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(recipe: Any, **_settings: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ExportError("the tracer failed") from None

    put_in_place_of_stages(monkeypatch, stage)
    exit_code, name = SIGNALS[number]
    result = CliRunner().invoke(app, ["export", "-q", "-o", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (
        exit_code,
        f"Error: {name}: nothing was written to {tmp_path / 'out'}\n",
    )


class _Loading(ModuleType):
    """A module that is interrupted while it is loaded, as torch may be."""

    def __getattr__(self, name: str) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AttributeError(name)


def test_a_signal_while_a_command_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashvaed_cli.stages.prune.run", _Loading("flashvaed_cli.stages.prune.run"))
    result = CliRunner().invoke(app, ["prune", "-q"])
    assert (result.exit_code, result.stderr) == (143, "Error: terminated: nothing was written\n")


def test_a_signal_while_the_result_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        paths = ()

        def table(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return "never shown"

    put_in_place_of_stages(monkeypatch, lambda *_words, **_settings: Result())
    result = CliRunner().invoke(app, ["prune", "-q"])
    assert (result.exit_code, result.stderr) == (143, "Error: terminated: all was written\n")


def test_sigterm_keeps_its_meaning_where_others_gave_it_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with signals_raise():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    with signals_raise(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with signals_raise():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_changes_of_an_output_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "a").write_text("a", encoding="utf-8")
    watch = OutputWatch(str(folder))
    (folder / ".draft").touch()
    assert watch.outcome().startswith("nothing was written")
    (folder / "b").touch()
    assert watch.outcome().startswith(f"{folder} was written")
    file = OutputWatch(str(tmp_path / "p.safetensors"))
    assert file.outcome().startswith("nothing was written")
    (tmp_path / "p.safetensors").touch()
    assert file.outcome().startswith(f"{tmp_path / 'p.safetensors'} was written")
