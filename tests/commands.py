"""Run the program inside the test process, and read what it printed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import flashvaed_cli
from flashvaed_cli.cli.app import app

CALIBRATION = "--num-calibration-clips 2 --num-frames 5 --crop-size 32"
TRAINING = "--num-clips 2 --num-frames 5 --crop-size 32 --batch-size 1 --loss-weight lpips=0"
JUDGING = "--num-speed-rounds 1 --lpips off --vmaf off"


def invoke(words: str, *, cwd: Path) -> Result:
    """Run `flashvaed WORDS` in a folder; a bug raises, a mistake is in the result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        arguments = shlex.split(words)
        device = [] if arguments[:1] == ["info"] else ["--device", "cpu"]  # it computes nothing
        result = CliRunner().invoke(app, [*arguments, *device])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(words: str, *, cwd: Path) -> dict[str, Any]:
    """Run `flashvaed WORDS --json` in a folder; returns the printed document, with warnings under `stderr`."""
    result = invoke(f"{words} --json --quiet", cwd=cwd)
    assert result.exit_code == 0, result.stderr
    return {**strict_json(result.stdout), "stderr": result.stderr}


_STAGES = {
    "analyze": "analyze",
    "prune": "prune.run",
    "convert_ops": "convert_ops",
    "distill": "distill.run",
    "evaluate": "evaluate.run",
    "speed": "speed.run",
    "export": "export.run",
}
"""Where the commands import `run_NAME` from, below `flashvaed_cli.stages`."""


def put_in_place_of_stages(patch: pytest.MonkeyPatch, stage: Callable[..., Any]) -> None:
    """Have every command call `stage`, without loading the real ones; a module that moved is an error here."""
    for name, module_name in _STAGES.items():
        assert (Path(flashvaed_cli.__file__).parent / "stages" / f"{module_name.replace('.', '/')}.py").is_file()
        module = ModuleType(f"flashvaed_cli.stages.{module_name}")
        setattr(module, f"run_{name}", stage)
        patch.setitem(sys.modules, module.__name__, module)
    previews = ModuleType("flashvaed_cli.stages.dry_run")  # it imports from the real ones
    for name in ("prune", "convert_ops", "distill"):
        setattr(previews, f"preview_{name}", stage)
    patch.setitem(sys.modules, previews.__name__, previews)


def strict_json(text: str) -> dict[str, Any]:
    """JSON as the standard has it: NaN and Infinity are mistakes."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def read_report(folder: Path) -> dict[str, Any]:
    """`report.json` of an eval."""
    return strict_json((folder / "report.json").read_text(encoding="utf-8"))
