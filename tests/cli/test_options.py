"""Flags and recipe models agree; flags reach the stage; mistakes leave one message and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from flashvaed_cli import __version__
from flashvaed_cli.cli.app import app
from flashvaed_cli.cli.flags import parse_by_stage
from flashvaed_cli.errors import CalibrationError, RecipeError
from flashvaed_cli.recipe import COMMAND_RECIPES
from flashvaed_cli.recipe.fields import SelectionRule, StageOperator
from tests.commands import put_in_place_of_stages

FLAG_OF_FIELD = {
    "keep_ratio": "ratio",
    "stage_keep_ratios": "ratio",
    "group_keep_ratios": "ratio",
    "operators": "operator",
    "loss_weights": "loss_weight",
}
RECIPE_ONLY = {"phases"}
NOT_FIELDS = {"recipe", "step", "force", "quiet", "verbose", "dry_run", "json_output", *FLAG_OF_FIELD.values()}


@dataclass
class FakeResult:
    paths: tuple[Path, ...] = (Path("made.safetensors"),)

    def table(self) -> str:
        return "the table"

    def as_dict(self) -> dict[str, object]:
        return {"psnr_db": float("inf"), "rows": [1.5]}


@dataclass
class FakeStage:
    """Stands for every stage: keeps what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def __call__(self, recipe: Any, **settings: Any) -> FakeResult:
        self.calls.append({"recipe": recipe, **settings})
        settings["progress"].log("working")
        settings["progress"].warn("beware")
        if self.error:
            raise self.error
        return FakeResult()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeStage:
    monkeypatch.chdir(tmp_path)  # a stage that is not replaced would write here
    fake = FakeStage()
    put_in_place_of_stages(monkeypatch, fake)
    return fake


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.mark.parametrize("command", COMMAND_RECIPES)
def test_every_setting_has_a_flag_and_every_flag_a_setting(command: str) -> None:
    program: Any = get_command(app)
    params = {param.name for param in program.commands[command].params} - {"help"}
    fields = set(COMMAND_RECIPES[command].model_fields) - RECIPE_ONLY
    assert {FLAG_OF_FIELD.get(name, name) for name in fields} == params - NOT_FIELDS | params & set(
        FLAG_OF_FIELD.values()
    )


def test_commands_stand_in_pipeline_order() -> None:
    program: Any = get_command(app)
    assert list(program.commands) == [
        "analyze",
        "prune",
        "convert-ops",
        "distill",
        "eval",
        "export",
        "decode",
        "info",
        "run",
        "recipes",
    ]


@pytest.mark.parametrize("command", COMMAND_RECIPES)
def test_help_has_examples(runner: CliRunner, command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "builtin:tiny-wan" in "".join(result.output.split())  # which some versions of typer break at the hyphen


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("", ("Options", "Commands", "Using a result")),
        ("prune", ("Arguments", "Options", "A target instead of ratios", "New weights", "Clips", "Common")),
        (
            "distill",
            (
                "Arguments",
                "Options",
                "Clips",
                "Optimization",
                "What phase 2 prepares for pruning",
                "A new, light decoder",
            ),
        ),
        ("decode", ("Arguments", "Options", "Video", "Running", "Common")),
        ("convert-ops", ("Arguments", "Options", "New weights", "Clips", "Common")),
    ],
)
def test_help_has_headings_at_80_columns(command: str, headings: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "flashvaed_cli", *command.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    lines = shown.splitlines()
    assert [line[:-1] for line in lines if line.endswith(":") and line[0] != " "][: len(headings)] == list(headings)
    assert all(len(line) <= 80 for line in lines if not line.strip().startswith("flashvaed "))  # these can be copied
    if command in ("prune", "distill"):
        table = shown[shown.index("Rules, by the channels") :]
        assert all(f"\n  {rule} " in table for rule in get_args(SelectionRule))
    if command == "convert-ops":
        assert f"Operators: {', '.join(get_args(StageOperator))}." in " ".join(shown.split())


def test_version(runner: CliRunner) -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"flashvaed {__version__}\n")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom flashvaed_cli.cli.app import main\n"
        "try:\n    main(['prune', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'numpy', 'av', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", COMMAND_RECIPES)
def test_no_arguments_are_a_complete_sentence(runner: CliRunner, stage: FakeStage, command: str) -> None:
    result = runner.invoke(app, [command])
    assert result.exit_code == 0, result.output
    (call,) = stage.calls
    assert call["recipe"] == COMMAND_RECIPES[command]()
    assert call["command_line"] == f"flashvaed {command}"
    assert call["force"] is False
    assert "the table" in result.stdout
    assert "wrote made.safetensors" in result.stdout
    assert "working" in result.stderr


def test_flags_reach_the_stage(runner: CliRunner, stage: FakeStage) -> None:
    words = "prune in.pth -r 0.5 --ratio up3=0.125 -d a.mp4 --data b --crop-size 0 --seed 3 --device cpu --force"
    result = runner.invoke(app, words.split())
    assert result.exit_code == 0, result.output
    recipe = stage.calls[0]["recipe"]
    assert recipe.input == "in.pth"
    assert recipe.ratios(("up2", "up3")) == {"up2": 0.5, "up3": 0.125}
    assert recipe.data == ("a.mp4", "b")
    assert (recipe.crop_size, recipe.seed, recipe.device) == (None, 3, "cpu")
    assert stage.calls[0]["force"] is True
    assert stage.calls[0]["command_line"] == "flashvaed " + words


def test_a_ratio_with_a_dot_is_of_a_channel_group(runner: CliRunner, stage: FakeStage, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("prune: {group_keep_ratios: {up2.stream: 0.5, up3.stream: 0.5}}")
    runner.invoke(app, ["prune", "--ratio", "up3=0.5", "--ratio", "up3.0.inner=0.25"])
    runner.invoke(app, ["distill", "--ratio", "up3.stream=0.25"])
    runner.invoke(app, ["prune", "--recipe", str(path), "--ratio", "up3.stream=0.25"])
    runner.invoke(app, ["prune", "--recipe", str(path), "--ratio", "0.25"])
    both, single, merged, common = (call["recipe"].ratios(("up2", "up3")) for call in stage.calls)
    assert both == {"up3": 0.5, "up3.0.inner": 0.25}
    assert single == {"up3.stream": 0.25}
    assert merged == {"up2.stream": 0.5, "up3.stream": 0.25}
    assert common == {"up2": 0.25, "up3": 0.25}


def test_keyed_flags_reach_the_stage(runner: CliRunner, stage: FakeStage) -> None:
    runner.invoke(app, ["convert-ops", "--operator", "up2=frame2d"])
    runner.invoke(app, ["distill", "--loss-weight", "sharpness=0.5", "--phase", "3"])
    runner.invoke(app, ["eval", "--no-video"])
    runner.invoke(app, ["export", "-t", "onnx"])
    convert, distill, evaluate, export = (call["recipe"] for call in stage.calls)
    assert convert.operators == {"up2": "frame2d"}
    assert (distill.loss_weights.sharpness, distill.loss_weights.l1, distill.phase) == (0.5, 10, "3")
    assert evaluate.video is False
    assert export.targets == ("onnx",)


def test_speed_has_a_stage_of_its_own(runner: CliRunner, stage: FakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = FakeStage()
    monkeypatch.setattr(sys.modules["flashvaed_cli.stages.speed.run"], "run_speed", timing)
    words = "eval --speed --sizes 480p,32x40 --frames 9,81 --compile --tile 8 --max-memory 4GB --autotune --chunk 2"
    result = runner.invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert stage.calls == []
    recipe = timing.calls[0]["recipe"]
    assert (recipe.sizes, recipe.frames, recipe.max_memory) == (("480p", "32x40"), (9, 81), "4GB")
    assert (recipe.compile, recipe.tile, recipe.autotune, recipe.chunk) == (True, 8, True, 2)


def test_a_common_ratio_replaces_the_recipes_ratios_by_stage(
    runner: CliRunner, stage: FakeStage, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("prune: {stage_keep_ratios: {up2: 0.5, up3: 0.5}, round_to: 4}")
    runner.invoke(app, ["prune", "--recipe", str(path), "--ratio", "0.25"])
    runner.invoke(app, ["prune", "--recipe", str(path), "--ratio", "up3=0.25"])
    common, single = (call["recipe"] for call in stage.calls)
    assert common.ratios(("up2", "up3")) == {"up2": 0.25, "up3": 0.25}
    assert single.ratios(("up2", "up3")) == {"up2": 0.5, "up3": 0.25}
    assert common.round_to == single.round_to == 4


def test_quiet_keeps_warnings(runner: CliRunner, stage: FakeStage) -> None:
    result = runner.invoke(app, ["prune", "--quiet"])
    assert result.stderr == "Warning: beware\n"


def test_json_is_one_object_on_stdout(runner: CliRunner, stage: FakeStage) -> None:
    result = runner.invoke(app, ["prune", "--json"])
    assert json.loads(result.stdout) == {
        "kind": "flashvaed-prune",
        "schema": 1,
        "psnr_db": "inf",
        "rows": [1.5],
        "paths": ["made.safetensors"],
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prune", "--ratio", "1.5"], "--ratio = 1.5: must be less than or equal to 1"),
        (["prune", "--ratio", "up3=2"], "--ratio.up3 = 2.0"),
        (["prune", "--ratio", "up3.stream=2"], "--ratio.up3.stream = 2.0"),
        (["prune", "--ratio", "big"], "'big' is not a value"),
        (["prune", "--ratio", "0.5", "--ratio", "0.25"], "given twice"),
        (["prune", "--recipe", "nowhere"], "no such file"),
        (["prune", "--step", "a"], "give --recipe too"),
        (["export", "--target", "tar"], "--target.0 = 'tar': must be 'safetensors', 'diffusers', "),
        (["distill", "--loss-weight", "3"], "write TERM=WEIGHT"),
        (["distill", "--loss-weight", "wavelet"], "'wavelet' is not a value; write TERM=WEIGHT"),
        (["distill", "--loss-weight", "=1"], "nothing stands before =; write TERM=WEIGHT"),
        (["convert-ops", "--operator", "frame2d"], "write STAGE=OPERATOR"),
        (["convert-ops", "--operator", "up2=fft"], "--operator.up2 = 'fft'"),
        (["eval", "--recipe", "fast"], "has no section for eval"),
        (["prune", ""], "INPUT = ''"),
        (["eval", "--speed", "--sizes", "8k"], "--sizes.0 = '8k': must be 480p, 720p, 1080p or WIDTHxHEIGHT"),
        (["eval", "--speed", "--frames", "9,x"], "--frames.1 = 'x'"),
        (["eval", "--speed", "--max-memory", "lots"], "--max-memory = 'lots': must be an amount of memory"),
        (["eval", "--autotune"], "--autotune: only with --speed"),
        (["eval", "--tile", "0"], "--tile = 0: must be greater than 0"),
    ],
)
def test_mistakes_exit_2_with_one_message(
    runner: CliRunner, stage: FakeStage, arguments: list[str], expected: str
) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert expected in result.stderr
    assert result.stdout == ""
    assert stage.calls == []


def test_a_stages_mistake_exits_2_and_a_bug_keeps_its_traceback(runner: CliRunner, stage: FakeStage) -> None:
    stage.error = CalibrationError("too few clips")
    result = runner.invoke(app, ["prune", "-q"])
    assert (result.exit_code, result.stderr) == (2, "Warning: beware\nError: too few clips\n")
    stage.error = ZeroDivisionError()
    assert isinstance(runner.invoke(app, ["prune"]).exception, ZeroDivisionError)


def test_parse_by_stage() -> None:
    assert parse_by_stage("--x", ["1", "a=2", "b=3"], int) == (1, {"a": 2, "b": 3})
    assert parse_by_stage("--x", None, int) == (None, {})
    with pytest.raises(RecipeError, match="nothing stands before ="):
        parse_by_stage("--x", ["=2"], int)


def test_an_interrupt_says_what_was_not_written(runner: CliRunner, stage: FakeStage) -> None:
    stage.error = KeyboardInterrupt()
    result = runner.invoke(app, ["prune", "-q", "--output", "mine.safetensors"])
    assert result.exit_code == 130
    assert result.stderr.endswith("Error: interrupted: nothing was written to mine.safetensors\n")


def test_mistakes_under_json_are_json(runner: CliRunner, stage: FakeStage) -> None:
    stage.error = CalibrationError("too few clips")
    for words, message in (
        (["prune", "--json"], "too few clips"),
        (["prune", "--json", "--ratio", "2"], "less than or equal to 1"),
        (["prune", "--jsonn", "--json"], "No such option: --jsonn"),
    ):
        result = runner.invoke(app, words)
        document = json.loads(result.stdout)
        assert (document["kind"], document["schema"], document["exit_code"]) == ("flashvaed-error", 1, result.exit_code)
        assert message in document["message"] and result.exit_code == 2 and message.split()[0] in result.stderr
    assert runner.invoke(app, ["prune"]).stdout == ""


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        ("prune --clips x", "--data"),
        ("distill --steps 3", "--num-steps"),
        ("prune --keep-ratio 0.5", "--ratio"),
        ("eval --teacher x", "--original"),
        ("prune --ratoi 0.5", "--ratio"),
        ("decode x --vae y", "--decoder"),
    ],
)
def test_words_of_other_programs_are_understood(runner: CliRunner, words: str, suggested: str) -> None:
    result = runner.invoke(app, words.split())
    assert result.exit_code == 2 and f"(Possible options: {suggested})" in " ".join(result.stderr.split())


def test_help_is_a_word_too(runner: CliRunner) -> None:
    assert runner.invoke(app, ["help"]).stdout == runner.invoke(app, ["--help"]).stdout
    assert runner.invoke(app, ["help", "prune"]).stdout == runner.invoke(app, ["prune", "--help"]).stdout
    assert "0 success; 1 finished, but a condition" in " ".join(runner.invoke(app, ["--help"]).stdout.split())


@pytest.mark.parametrize("command", sorted(COMMAND_RECIPES))
def test_nothing_of_a_help_text_is_taken_for_markup(command: str) -> None:
    """Rich swallows words in square brackets."""
    texts = [field.description or "" for field in COMMAND_RECIPES[command].model_fields.values()]
    assert not [text for text in texts if re.search(r"\[[a-z]", text)]
