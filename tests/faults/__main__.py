"""Every call that changes a file fails, every file that is read vanishes or changes, TMPDIR is full, the clock jumps.

`python -m tests.faults --cases 1000 --seed 1`. A process imports the program once and forks for every case: a copy of a
folder with outputs of an earlier run, one command that replaces one of them, one fault. Afterwards the inputs and all
other outputs must be as they were, the command's output the old one or a whole new one, the exit status right and the
message one error; and the command run again without a fault must succeed and leave nothing behind. Prints what was
tried, by command and by fault; Ctrl-C ends it early.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("inject.c")
REPOSITORY = Path(__file__).resolve().parents[2]
KILL = -1
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "EINTR": errno.EINTR, "SIGKILL": KILL}
READING = {"vanishes": 0, "changes": 1}
"""Faults of files about to be read: removed, or replaced by another of the same kind."""
FULL_TMPDIR, JUMPING_CLOCK = "TMPDIR full", "clock jumps"
KINDS = (*FAULTS, *READING, FULL_TMPDIR, JUMPING_CLOCK)
JUMPS_S = (-400 * 86_400, -3_600, 7, 3_600, 400 * 86_400)
SHOWN_EVERY = 50
LASTING = ("ENOSPC", "EACCES")
"""Faults that stay: a disk that is full stays full."""
_LIBRARY = "FLASHVAED_FAULTS_LIBRARY"
_WORDS = {
    FULL_TMPDIR: "set TMPDIR to a folder with more",
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "EACCES": "Permission denied",
}


@dataclass(frozen=True)
class Case:
    """What happens to a command: its nth call that changes a file fails, or the nth file that it opens for reading is
    not what it was. A clock jumps by the nth of `JUMPS_S`."""

    command: int
    fault: str
    nth: int


@dataclass(frozen=True)
class Ended:
    """How a forked run ended: status, stderr, how many calls that change or open files it made, and which was hit."""

    status: int
    stderr: str
    num_calls: int
    num_reads: int
    hit: str


def build(folder: Path) -> Path:
    """Compile the library that makes calls fail.

    Raises:
        FileNotFoundError: no C compiler.
    """
    library = folder / "inject.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def start(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run this module in a process of its own; its output is in the result."""
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, text=True, check=False, stdout=subprocess.PIPE)


def begin_again_with_library() -> None:
    """Become the same process with the library loaded, whose folder it removes at its end."""
    library = build(Path(os.path.realpath(tempfile.mkdtemp(prefix="flashvaed-faults-"))))
    more = {"LD_PRELOAD": str(library), _LIBRARY: str(library), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]], {**os.environ, **more})


class Bench:
    """Runs commands in forks of this process, whose changing calls can be made to fail."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(os.environ[_LIBRARY])
        self._library.faults_count.restype = self._library.faults_num_reads.restype = ctypes.c_long
        self._library.faults_hit.restype = ctypes.c_char_p
        self._library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._library.faults_arm_reads.argtypes = [ctypes.c_long, ctypes.c_int]
        self._library.faults_arm_clock.argtypes = [ctypes.c_long]
        self._outcome = folder / "outcome"
        self._stderr = folder / "stderr"

    def run(
        self,
        words: str,
        world: Path,
        *,
        nth: int = 0,
        fault: str | None = None,
    ) -> Ended:
        """A command in a folder, in a process of its own.

        Args:
            nth, fault: as in `Case`; None: nothing happens.
        """
        self._outcome.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._run_here(words, world, nth, fault)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        calls, reads, hit = self._outcome.read_text().split("\n") if self._outcome.exists() else ("0", "0", "")
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, self._stderr.read_text(errors="replace"), int(calls), int(reads), hit)

    def _run_here(self, words: str, world: Path, nth: int, fault: str | None) -> None:
        from flashvaed_cli.cli.app import main

        code = 70
        try:
            os.chdir(world)
            stderr = os.open(self._stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stderr, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ["FLASHVAED_CACHE"] = str(world / ".cache")  # whose calls fail too
            sys.argv = ["flashvaed", *words.split(), "--device", "cpu"]
            self._arm(world, nth, fault)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
            counts = f"{self._library.faults_count()}\n{self._library.faults_num_reads()}"
            hit = self._library.faults_hit().decode()
            self._library.faults_arm(b"", 0, 0, 0)
            sys.stderr.flush()
            self._outcome.write_text(f"{counts}\n{hit}")
        finally:
            os._exit(code)

    def _arm(self, world: Path, nth: int, fault: str | None) -> None:
        temporary = self._outcome.with_name("temporary")
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        if fault == FULL_TMPDIR:
            self._library.faults_arm(f"{temporary}/".encode(), nth, errno.ENOSPC, True)
            return
        number = FAULTS.get(fault or "", 0)
        self._library.faults_arm(f"{world}/".encode(), nth, number, fault in LASTING)
        if fault in READING:
            self._library.faults_arm_reads(nth, READING[fault])
        if fault == JUMPING_CLOCK:
            self._library.faults_arm_clock(JUMPS_S[nth - 1])


def check(bench: Bench, case: Case, old: Path, names: set[str], place: Path) -> tuple[str, list[str]]:
    """Run a case; returns the call or file that was hit and what was wrong afterwards."""
    from tests.faults.world import (
        COMMANDS,
        copy_world,
        fault_of_output,
        files_of,
        is_leftover,
        is_part_of,
        negative_durations,
    )

    command = COMMANDS[case.command]
    copy_world(old, place)
    before = files_of(place)
    ended = bench.run(command.with_seed(2), place, nth=case.nth, fault=case.fault)
    after = files_of(place)
    wrong = []
    meant = {path for path in before if case.fault in READING and Path(path).name == ended.hit}
    lost = [
        path
        for path in before
        if not is_part_of(path, command.output) and path not in meant and after.get(path) != before[path]
    ]
    added = [path for path in after if path not in before and not is_part_of(path, command.output)]
    if lost or added:
        wrong.append(f"other files were touched: {[*lost, *added][:4]}")
    mine = {
        path: digest
        for path, digest in before.items()
        if path not in meant and (path == command.output or path.startswith(f"{command.output}/"))
    }
    now = {path: after.get(path) for path in mine}
    if now != mine and (fault := fault_of_output(place, command.output, names)) is not None:
        wrong.append(f"the output is neither old nor whole: {fault}")
    if case.fault == "SIGKILL":
        if ended.status not in (0, -signal.SIGKILL):
            wrong.append(f"status {ended.status} of a killed run")
    elif ended.status == 2:
        wrong += _faults_of_message(case.fault, ended.stderr)
        if case.fault == JUMPING_CLOCK:
            wrong.append(f"the time of day is no reason to fail: {ended.stderr[-300:]!r}")
    elif ended.status == 0:
        if fault := fault_of_output(place, command.output, names):
            wrong.append(f"success, and the output is not whole: {fault}")
        if negative := negative_durations(place / command.output):
            wrong.append(f"negative durations: {negative[:4]}")
    else:
        wrong.append(f"status {ended.status}: {ended.stderr[-300:]!r}")
    for path in meant:
        shutil.copy2(old / path, place / path)
    again = bench.run(command.with_seed(2), place)
    if again.status != 0:
        wrong.append(f"run again: status {again.status}: {again.stderr[-300:]!r}")
    left = [str(path.relative_to(place)) for path in place.rglob(".*") if is_leftover(path.relative_to(place))]
    if left := [path for path in left if ".partial-" in path or path.endswith(".lock")]:
        wrong.append(f"left behind after the next run: {left[:4]}")
    hit = {"SIGKILL": "killed", JUMPING_CLOCK: f"{JUMPS_S[case.nth - 1]} s" if case.fault == JUMPING_CLOCK else ""}
    return ended.hit or hit.get(case.fault, "none"), wrong


def _faults_of_message(fault: str, stderr: str) -> list[str]:
    wrong = []
    if stderr.count("Error:") != 1 or "Traceback" in stderr:
        wrong.append(f"not one error: {stderr[-300:]!r}")
    elif fault in _WORDS and _WORDS[fault] not in stderr:
        wrong.append(f"the message does not say {_WORDS[fault]!r}: {stderr[-300:]!r}")
    if fault == "EINTR":
        wrong.append(f"interrupted calls are to be made again: {stderr[-300:]!r}")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many, drawn evenly over commands and faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args(argv)
    os.environ["FLASHVAED_CACHE"] = "off"
    if _LIBRARY not in os.environ:
        begin_again_with_library()
    folder = Path(os.environ[_LIBRARY]).parent
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        return _run(arguments.cases, arguments.seed, arguments.seconds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(num_cases: int, seed: int, seconds: float, folder: Path) -> int:
    from tests.faults.world import COMMANDS, copy_world, files_of, make_world

    bench = Bench(folder)
    old, place = folder / "old", folder / "world"
    make_world(old)
    whole, names = [], []
    for command in COMMANDS:
        copy_world(old, place)
        ended = bench.run(command.with_seed(2), place)
        assert ended.status == 0, ended.stderr
        whole.append(ended)
        names.append({path for path in files_of(place) if path.startswith(f"{command.output}/")})
    rng, began = random.Random(seed), time.monotonic()
    hits: Counter[tuple[str, str]] = Counter()
    tried: Counter[str] = Counter()
    num_findings, ending = 0, ""
    try:
        for index in range(num_cases):
            if time.monotonic() - began > seconds:
                break
            number, kind = index % len(COMMANDS), KINDS[index % len(KINDS)]  # 7 and 9: all pairs come in turn
            among = {**dict.fromkeys(READING, whole[number].num_reads), FULL_TMPDIR: 1, JUMPING_CLOCK: len(JUMPS_S)}
            case = Case(number, kind, rng.randint(1, among.get(kind, whole[number].num_calls)))
            hit, wrong = check(bench, case, old, names[number], place)
            hits[kind, hit] += 1
            tried[COMMANDS[number].name] += 1
            num_findings += len(wrong)
            if wrong:
                print(f"{COMMANDS[number].name}, call {case.nth} ({hit}) {kind}: {wrong}", flush=True)
            if (index + 1) % SHOWN_EVERY == 0:
                print(f"... {index + 1} faults, {num_findings} findings", flush=True)
    except KeyboardInterrupt:
        ending = ", interrupted"
    calls = ", ".join(
        f"{command.name} {one.num_calls}+{one.num_reads}" for command, one in zip(COMMANDS, whole, strict=True)
    )
    duration = f"{time.monotonic() - began:.0f} s"
    print(f"{sum(tried.values())} faults, seed {seed}, {duration}{ending}; calls that change and open files: {calls}")
    print("by command: " + ", ".join(f"{name} {count}" for name, count in sorted(tried.items())))
    print("by fault: " + ", ".join(f"{fault} ({call}) {count}" for (fault, call), count in sorted(hits.items())))
    print(f"{num_findings} findings")
    return num_findings > 0


if __name__ == "__main__":
    raise SystemExit(main())
