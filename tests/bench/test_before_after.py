"""A commit beside an earlier one, in turns: full-size Wan 2.1 decoders, random weights.

`FLASHVAED_BENCH_BEFORE=<commit>` names the earlier code and `FLASHVAED_BENCH_AFTER` the later (this clone, as it is);
both are checked out into temporary folders. Each runs in a process of its own, and they take turns decoder by decoder.
`FLASHVAED_BENCH_CASES` chooses what they decode,
as `exact:9x256x256` (`eager`, `exact`, `mild` or `flash`; frames, height, width), and `@busy` behind one decodes it
beside a process that keeps a core busy. Prints medians of `FLASHVAED_BENCH_ROUNDS` rounds (3) and the range of the
ratios; nothing is asserted about times. Commits back to 28 November 2026 can be named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown
from tests.bench.full_size import setting
from tests.bench.test_busy_machine import busy_process

REPOSITORY = Path(__file__).parents[2]
BEFORE, AFTER = (os.environ.get(f"FLASHVAED_BENCH_{name}", "") for name in ("BEFORE", "AFTER"))
CASES = os.environ.get(
    "FLASHVAED_BENCH_CASES", "eager:9x256x256 exact:9x256x256 mild:9x256x256 flash:9x256x256"
).split()
_BUSY = "@busy"
_CHILD = """
import json, sys, time, torch
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.bench.full_size import paper_layout, random_decoder
torch.set_num_threads(int(sys.argv[1]))
specs = {"eager": wan_decoder_spec(96), "exact": wan_decoder_spec(96), "mild": wan_decoder_spec(67),
         "flash": paper_layout(96, 0.125)}
made = {}
for line in sys.stdin:
    name, num_frames, height, width = json.loads(line)
    if name not in made:
        torch.manual_seed(0)
        plain = random_decoder(specs[name], "cpu")
        eager = name == "eager"
        settings = DecodeSettings(memory_format="contiguous" if eager else "channels-last")
        made[name] = DecodeRuntime(plain if eager else exact_decoder(plain), settings)
    latents = torch.randn(1, 16, (num_frames + 3) // 4, height // 8, width // 8)
    with torch.no_grad():
        start = time.perf_counter()
        made[name].decode(latents)
        print(json.dumps(time.perf_counter() - start), flush=True)
"""


class Decoders:
    """The decoders of one clone, in a process that keeps them ready."""

    def __init__(self, clone: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
        environment |= {"PYTHONPATH": str(clone), "GOMP_SPINCOUNT": "10000"}  # as the command line sets it
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(len(os.sched_getaffinity(0)))],
            cwd=clone,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: str) -> float:
        """How long one decoding takes."""
        name, _, size = case.removesuffix(_BUSY).partition(":")
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *map(int, size.split("x"))]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A folder with the files of a commit; without one, this clone."""
    if not commit:
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


@pytest.mark.bench
@pytest.mark.skipif(not BEFORE, reason="FLASHVAED_BENCH_BEFORE names no commit")
def test_before_and_after(tmp_path: Path) -> None:
    with ExitStack() as stack:
        clones = [
            stack.enter_context(checked_out(BEFORE, tmp_path / "before")),
            stack.enter_context(checked_out(AFTER, tmp_path / "after")),
        ]
        both = [Decoders(clone) for clone in clones]
        for decoders in both:
            stack.enter_context(decoders.process)
            stack.callback(decoders.process.kill)
        for case in CASES:
            for decoders in both:
                decoders.seconds(case)  # the first call of each is not counted
        found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for _ in range(setting("ROUNDS", 3)):
            for case, rounds in found.items():
                with busy_process() if case.endswith(_BUSY) else nullcontext():
                    before, after = (decoders.seconds(case) for decoders in both)
                rounds.append((before, after))
    rows: list[tuple[Cell, ...]] = []
    for case, rounds in found.items():
        ratios = [before / after for before, after in rounds]
        seconds = [median(one) for one in zip(*rounds, strict=True)]
        rows.append((case, *seconds, median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}"))
    columns = (
        Column("decoded", align="left"),
        Column("before, s", ".3g"),
        Column("after, s", ".3g"),
        Column("times as fast", ".2f"),
        Column("range"),
    )
    Console(width=120).print(
        to_markdown(TableData(f"{BEFORE} and {AFTER or 'now'}", columns, tuple(rows))), markup=False
    )
    assert all(before > 0 and after > 0 for rounds in found.values() for before, after in rounds)
