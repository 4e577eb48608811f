"""`python -m tests.fuzz --seconds 600 --seed 1`: mutate inputs until the time is over, and list what broke.

The targets take turns of 60 cases, each with a seed of its own, and get the same CPU time in the end. A failure is told
once, by the place in the package that it comes from; hypothesis has made its input small by then. Ctrl-C ends it after
the case, with the counts so far. Exit code 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from tests.fuzz.targets import HEAVY_INPUT, TARGETS, Target

TURN = 60
SHOWN_EVERY_S = 60.0
SHOWN_CHARS = 2000
SLOW_SECONDS = 10.0
"""Of CPU time for one case; a refusal takes less than one."""


def place_of(error: BaseException) -> str:
    """The kind of an error and the innermost line of the package, or of the fuzzer, that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "flashvaed_cli" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def run_turn(
    target: Target,
    number: int,
    known: set[str],
    counts: Counter[str],
    name: str,
    is_over: Callable[[], bool] = lambda: False,
) -> BaseException | None:
    """One turn of a target; the first failure that is not known yet.

    Args:
        is_over: asked before each case; true skips what is left.
    """

    @seed(number)
    @settings(
        max_examples=TURN,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=HEAVY_INPUT,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        if is_over():
            return
        counts[name] += 1
        start = time.process_time()
        try:
            with tempfile.TemporaryDirectory() as folder:
                target(data.draw, Path(folder))
        except Exception as error:
            if place_of(error) not in known:
                failures.append(error)
                raise
        if time.process_time() - start > SLOW_SECONDS:  # no error: hypothesis would not find it again
            known.add(f"a slow case of {name}, in the turn of seed {number}")

    failures = list[Exception]()
    try:
        run()
    except Exception as error:
        if failures:
            return failures[-1]
        return None if is_over() else error  # what is skipped looks inconsistent to hypothesis, which then says so
    return None


def described(error: BaseException) -> str:
    """The end of an error's traceback, its message, and what hypothesis says of the input, each cut short."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    message = f"{type(error).__name__}: {error}"
    return "".join(traceback.format_tb(error.__traceback__, limit=-6)) + "\n".join(
        one[:SHOWN_CHARS] for one in (message, *notes)
    )


def main() -> int:
    """Run until the time is over; print cases, time, seed and findings."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Mutate inputs until the time is over, and list what broke."
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="time to spend, in all")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same cases")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; repeatable")
    chosen = parser.parse_args()
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", HypothesisWarning)  # about the length of what was drawn
    torch.set_warn_always(True)  # a warning is an error every time, so that hypothesis finds it again
    names = chosen.target or list(TARGETS)
    counts, turns, known = Counter[str](), Counter[str](), set[str]()
    seconds = dict.fromkeys(names, 0.0)
    start = time.monotonic()
    interrupts = list[int]()

    def on_interrupt(number: int, _frame: object) -> None:
        interrupts.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one ends a case that hangs

    signal.signal(signal.SIGINT, on_interrupt)
    print(f"seed {chosen.seed}", flush=True)
    shown_at = start
    while not interrupts and time.monotonic() - start < chosen.seconds:
        name = min(names, key=lambda one: seconds[one])
        number = chosen.seed * 1_000_003 + turns[name]
        began = time.process_time()
        failure = run_turn(TARGETS[name], number, known, counts, name, lambda: bool(interrupts))
        seconds[name] += time.process_time() - began
        if failure is not None:
            known.add(place_of(failure))
            print(f"\nFOUND in {name} (turn {turns[name]}): {place_of(failure)}", flush=True)
            print(described(failure), flush=True)
        turns[name] += 1
        if time.monotonic() - shown_at > SHOWN_EVERY_S:
            shown_at = time.monotonic()
            print(f"... {sum(counts.values())} cases, {len(known)} findings", flush=True)
    ending = ", interrupted" if interrupts else ""
    cpu = f"{time.process_time():.0f} s of CPU time"
    print(f"\n{sum(counts.values())} cases, seed {chosen.seed}, {turns.total()} turns, {cpu}{ending}")
    for name in names:
        print(f"  {name:22} {counts[name]:8} cases {seconds[name]:8.0f} s")
    print(f"findings: {len(known)}" + "".join(f"\n  {place}" for place in sorted(known)))
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
