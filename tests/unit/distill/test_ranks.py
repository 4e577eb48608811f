"""A step's clips give one gradient, however they are spread over micro-batches and processes."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed

from flashvaed_cli.distill.losses import r2_loss
from flashvaed_cli.distill.ranks import ALONE, Ranks
from flashvaed_cli.errors import MediaError
from tests.unit.distill.trained_elsewhere import Trained, clips_of, one_of_two_ranks, trained

NUM_STEPS = 3
# Float32 sums in another order differ by about 1e-6 of a gradient; where a gradient is little more than that, AdamW,
# which divides it by its own size, makes much of it. So: of the way that all weights went, one part in a hundred.
CLOSE, APART = 0.01, 0.2


def distance(one: Trained, other: Trained) -> float:
    """How far two students are from each other, as a fraction of how far the second has come."""
    start = trained(3 if one.is_pruned else 2, 0, lambda _: ()).weights
    moved = sum(float((value - start[name]).square().sum()) for name, value in other.weights.items())
    apart = sum(float((value - one.weights[name]).square().sum()) for name, value in other.weights.items())
    return (apart / moved) ** 0.5


def assert_same_training(one: Trained, other: Trained) -> None:
    assert distance(one, other) < CLOSE
    for name in ("loss", "l1", "gradient_norm"):  # of the first step, which nothing has amplified
        assert one.history[0][name] == pytest.approx(other.history[0][name], rel=1e-4, abs=1e-6)


def test_micro_batches_are_one_batch() -> None:
    whole = trained(3, NUM_STEPS, lambda step: (clips_of(step),))
    assert_same_training(trained(3, NUM_STEPS, lambda step: clips_of(step).split(1)), whole)
    assert distance(trained(3, NUM_STEPS, lambda step: clips_of(step).split(2)[:1]), whole) > APART


@pytest.mark.parametrize("phase", [2, 3])
def test_two_processes_are_one_with_the_double_batch(tmp_path: Path, phase: int) -> None:
    """Over gloo; in phase 2 with L_ce, whose R² is that of all clips together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.distill.trained_elsewhere", "torch._dynamo", "accelerate"])
    paths = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        context.Process(target=one_of_two_ranks, args=(rank, port, phase, NUM_STEPS, path))
        for rank, path in enumerate(paths)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (Trained(**torch.load(path, weights_only=True)) for path in paths)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert_same_training(first, trained(phase, NUM_STEPS, lambda step: (clips_of(step),)))


def test_the_covariance_of_all_ranks_has_the_gradient_of_the_whole() -> None:
    """Two ranks taken one after the other: what a rank cannot see comes in by the mean."""
    whole = torch.randn(4, 5, 2, 3, 3, dtype=torch.float64).mul(torch.arange(1, 6).view(5, 1, 1, 1)).requires_grad_()
    expected = r2_loss(whole, [0, 2])
    (gradient,) = torch.autograd.grad(expected, whole)

    halves = [half.detach().requires_grad_() for half in whole.split(2)]
    rows = [half.detach().movedim(1, -1).flatten(0, -2) for half in halves]
    mean = torch.stack([own.mean(dim=0) for own in rows]).mean(dim=0)
    covariance = torch.stack([(own - mean).T @ (own - mean) / len(own) for own in rows]).mean(dim=0)
    parts = []
    for half in halves:
        answers = iter([mean, covariance])
        loss = r2_loss(half, [0, 2], mean_over_ranks=lambda _, answers=answers: next(answers))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        parts.append(torch.autograd.grad(loss, half)[0] / 2)  # the mean over two ranks
    # The mean is not differentiated: right to first order in the tiny ridge.
    assert torch.allclose(torch.cat(parts), gradient, rtol=1e-4, atol=1e-7)


def test_alone_nothing_is_exchanged() -> None:
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(ALONE.mean(value), value) and ALONE.is_main
    assert ALONE.from_main(lambda: 3) == 3
    assert not distributed.is_initialized()
    with pytest.raises(MediaError, match="no clip"):
        ALONE.from_main(_no_clip)


def _no_clip() -> None:
    raise MediaError("no clip")


def test_what_the_main_rank_cannot_do_ends_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[object] = []

    def broadcast(objects: list, src: int) -> None:
        if objects[0] is None:
            objects[0] = spoken[-1]
        spoken.append(objects[0])

    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    with pytest.raises(MediaError) as first:
        Ranks(0, 2).from_main(_no_clip)
    with pytest.raises(Exception, match="no clip") as second:
        Ranks(1, 2).from_main(_no_clip)
    assert not first.value.is_told_elsewhere and second.value.is_told_elsewhere  # type: ignore[attr-defined]
    assert second.value.exit_code == first.value.exit_code == 2  # type: ignore[attr-defined]
