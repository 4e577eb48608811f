from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashvaed_cli
from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.metrics import autotune as room
from flashvaed_cli.metrics.autotune import (
    Choice,
    autotune,
    cache_key,
    choice_file,
    remember_choice,
    remembered_choice,
)
from flashvaed_cli.metrics.contest import Contestant, ContestResult
from flashvaed_cli.metrics.speed import SpeedResult
from tests.toy import flash_spec, original_spec


class FakeContest:
    """Gives every choice its seconds instead of timing it; what has none does not fit into memory."""

    def __init__(self, seconds: Callable[[Choice], float | None]) -> None:
        self.seconds = seconds
        self.tried: list[list[Choice]] = []

    def __call__(self, contestants: list[Contestant], device: object, **_: object) -> list[ContestResult]:
        choices = [contestant.prepare()() for contestant in contestants]
        self.tried.append(choices)  # type: ignore[arg-type]
        found = [self.seconds(choice) for choice in choices]  # type: ignore[arg-type]
        return [
            ContestResult(c.name, failure="out of memory") if s is None else ContestResult(c.name, SpeedResult((s,)))
            for c, s in zip(contestants, found, strict=True)
        ]


def tune(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Choice], float | None], **settings: object) -> FakeContest:
    contest = FakeContest(seconds)
    monkeypatch.setattr(room, "run_contest", contest)
    contest.found = autotune(lambda choice: lambda: choice, "cpu", **settings)  # type: ignore[arg-type, attr-defined]
    return contest


def test_the_fastest_of_every_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(choice: Choice) -> float:
        slow = 1.0 * (choice.memory_format == "contiguous") + 0.5 * (not choice.exact)
        return 3.0 + slow + {None: 0.3, 1: 0.4, 2: 0.2}[choice.chunk] - 2.0 * choice.compile

    contest = tune(monkeypatch, seconds, num_latents=3, with_compile=True)
    assert contest.found.choice == Choice("channels-last", exact=True, compile=True, chunk=2)  # type: ignore[attr-defined]
    assert [len(step) for step in contest.tried] == [4, 3, 2]
    assert len(contest.found.tried) == 4 + 2 + 1  # type: ignore[attr-defined]


def test_compilation_is_not_tried_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = tune(monkeypatch, lambda _: 1.0, num_latents=1)
    assert [len(step) for step in contest.tried] == [4]  # one latent frame: no chunks either
    assert not any(choice.compile for choice in contest.tried[0])


def test_a_given_chunk_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = tune(monkeypatch, lambda _: 1.0, num_latents=9, fixed_chunk=2)
    assert {choice.chunk for step in contest.tried for choice in step} == {2}


def test_what_does_not_fit_at_once_is_tried_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = tune(monkeypatch, lambda c: None if c.chunk is None or c.chunk > 2 else 1.0 / c.chunk, num_latents=9)
    assert contest.found.choice.chunk == 2  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="no way"):
        tune(monkeypatch, lambda _: None, num_latents=9)


def test_choices_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHVAED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = choice_file("a"), choice_file("b")
    assert first != second and {first.parent, second.parent} == {tmp_path / "flashvaed" / "autotune"}
    assert remembered_choice(first, "a") is None
    choice = Choice("contiguous", exact=False, compile=True)
    with atomic_path(second):  # another process is about to store its choice
        remember_choice(first, "a", choice)
    assert remembered_choice(first, "a") == choice
    assert remembered_choice(first, "b") is None  # a file that was moved


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"key": "a"}',
        '{"choice": {"chunk": 1}}',
        '{"key": "a", "choice": 3}',
        '{"key": "a", "choice": {"speed": 1}}',
        '{"key": "a", "choice": {"chunk": 1',
        '{"key": "a", "choice": {"chunk": 0}}',
        '{"key": "a", "choice": {"chunk": "2"}}',
        '{"key": "a", "choice": {"memory_format": "diagonal"}}',
        '{"key": "a", "choice": {"exact": 1}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_file_remembers_nothing_and_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert remembered_choice(path, "a") is None
    remember_choice(path, "a", Choice())
    assert remembered_choice(path, "a") == Choice()


def test_a_pipe_remembers_nothing_and_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    os.mkfifo(path)
    assert remembered_choice(path, "a") is None


def test_a_key_names_all_that_a_choice_depends_on() -> None:
    device, spec, grid = torch.device("cpu"), original_spec(), (3, 4, 5)
    key = cache_key(spec, grid, torch.float32, device)
    assert torch.__version__ in key and flashvaed_cli.__version__ in key and "3x4x5" in key and "float32" in key
    others = {
        cache_key(flash_spec(), grid, torch.float32, device),
        cache_key(spec, (3, 5, 4), torch.float32, device),
        cache_key(spec, grid, torch.bfloat16, device),
        cache_key(spec, grid, torch.float32, device, chunk=2),
    }
    assert len(others | {key}) == 5
    assert cache_key(spec, grid, torch.float32, device, chunk=None) == key


def test_a_choice_in_words() -> None:
    assert str(Choice()) == "exact operators, channels-last"
    assert str(Choice("contiguous", False, True, 2)) == "plain operators, contiguous, compiled, chunk 2"
