"""A small, fixed share of `make fuzz`: what opens input from elsewhere succeeds or says what is wrong with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from tests.conftest import REPOSITORY
from tests.fuzz import seeds
from tests.fuzz.__main__ import place_of, run_turn
from tests.fuzz.mutations import Draw
from tests.fuzz.targets import HEAVY_INPUT, TARGETS

EXAMPLES = 25


@pytest.mark.parametrize("name", TARGETS)
def test_success_or_a_users_error(name: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=HEAVY_INPUT,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name](data.draw, Path(folder))

    run()


def test_a_failure_is_found_once() -> None:
    def breaks(draw: Draw, _folder: Path) -> None:
        if draw(st.integers(0, 9)) == 7:
            raise KeyError("a bug")

    known, counts = set[str](), Counter[str]()
    first = run_turn(breaks, 1, known, counts, "x")
    assert isinstance(first, KeyError) and counts["x"] > 0
    known.add(place_of(first))
    assert run_turn(breaks, 2, known, counts, "x") is None


def test_an_interrupted_run_tells_its_counts() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "600", "--seed", "7", "--target", "recipes"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "seed 7\n"
        run.send_signal(signal.SIGINT)
        shown, complaint = run.communicate(timeout=60)
    assert run.returncode == 0, complaint
    assert " cases, seed 7, " in shown and ", interrupted" in shown and "findings: 0" in shown


@pytest.mark.parametrize("name", seeds.FOREIGN)
def test_seeds_are_read(name: str, tmp_path: Path) -> None:
    """What starts as refused finds nothing."""
    config, tensors = seeds.foreign(name)
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(
        tmp_path if config is not None else tmp_path / "diffusion_pytorch_model.safetensors",
        builtins={},
        family=seeds.FAMILY_OF[name],
    )
    assert checkpoint.decoder is not None
