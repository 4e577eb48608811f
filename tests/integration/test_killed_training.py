"""SIGKILL at twenty random moments of one training: it ends with the weights of a training that nobody killed."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.unit.distill.trained_elsewhere import train_to_the_end

NUM_KILLS = 20
MOST_STEPS_PER_LIFE = 3
NUM_STEPS = NUM_KILLS * MOST_STEPS_PER_LIFE + 5  # more than the killed ones can do together
LONGEST_DELAY_S = 0.03  # about a step


def test_twenty_kills(tmp_path: Path) -> None:
    """The processes are forked by a server that has imported torch: a start takes milliseconds, not seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.distill.trained_elsewhere", "torch._dynamo"])  # optimizers load it
    path, moments = tmp_path / "phase3.ckpt", random.Random(0)

    def start() -> tuple[ForkServerProcess, Connection, list[int]]:
        """Start a life and let it take up some steps; returns their numbers too, and where the next ones come from."""
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=train_to_the_end, args=(path, NUM_STEPS, there))
        process.start()
        there.close()
        return process, here, [here.recv() for _ in range(moments.randint(1, MOST_STEPS_PER_LIFE))]

    reached = []
    for _ in range(NUM_KILLS):
        process, here, steps = start()
        time.sleep(moments.uniform(0, LONGEST_DELAY_S))  # anywhere between this step and the next
        process.kill()
        process.join()
        here.close()  # not before: a life that cannot announce its next step would end of itself
        assert process.exitcode == -signal.SIGKILL
        reached.append(steps)
    # A life begins where the one before it saved last: at the step that it was killed in, or behind it.
    for before, after in pairwise(reached):
        assert after[0] >= before[-1]

    survivor, result = train_to_the_end(path, NUM_STEPS)
    expected, whole = train_to_the_end(None, NUM_STEPS)
    assert result.resumed_from is not None and result.resumed_from >= reached[-1][-1]
    for name, value in expected.state_dict().items():
        assert torch.equal(survivor.state_dict()[name], value), name
    assert [{**entry, "seconds": 0} for entry in result.history] == [{**e, "seconds": 0} for e in whole.history]
