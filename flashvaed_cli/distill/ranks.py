"""The processes that train together, one per device, as `accelerate launch` or torchrun starts them.

Gradients are averaged by hand after the last backward pass of a step instead of by DistributedDataParallel: the
clips of a step, however they are split, then give the same gradient, whatever is frozen, recomputed or left without a
gradient; and the norm that is clipped is that of the whole. All that DDP would overlap with the backward pass is one
all-reduce of 24 MB (Wan's student) in a step of about a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from flashvaed_cli.errors import FlashVaedError

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)  # the others wait while the main process encodes all clips


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that train together. Only rank 0, the main one, writes and prints."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks; no gradient flows through it."""
        total = values.detach().clone()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks; no gradient flows through it."""
        return self.sum(values) / self.count

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all ranks. A rank without one contributes zeros."""
        if self.count == 1:
            return
        trained = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = self.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter).clone(memory_format=torch.preserve_format)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main rank."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        """Return when all ranks have got here."""
        if self.count > 1:
            self.sum(torch.zeros(1, device=_own_device()))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        found: list = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Let the main rank make something while the others wait; all return it.

        Raises:
            FlashVaedError: what `make` raised; on the other ranks with `is_told_elsewhere`.
        """
        if self.count == 1:
            return make()
        outcome: list = [None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                outcome = [("made", make())]
            except BaseException as error:  # the others must not wait for ever, whatever it is
                exit_code = error.exit_code if isinstance(error, FlashVaedError) else 1
                failure, outcome = error, [("failed", str(error), exit_code)]
        distributed.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[0][0] == "failed":
            raise told_by_main(*outcome[0][1:])
        return outcome[0][1]


ALONE = Ranks()


def told_by_main(message: str, exit_code: int) -> FlashVaedError:
    """An error that another rank has already printed."""
    error = FlashVaedError(message)
    error.exit_code = exit_code
    error.is_told_elsewhere = True
    return error


def _own_device() -> torch.device:
    """Where this process's tensors must be for the ranks to exchange them."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes of a launch, by gloo on CPUs and NCCL on GPUs; alone if there is no launch.

    Yields:
        The ranks, and this process's own device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    from accelerate import PartialState  # takes a second to import

    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    yield Ranks(state.process_index, state.num_processes), torch.device(state.device or device)
    state.destroy_process_group()  # not after an error, when the others may be stuck
