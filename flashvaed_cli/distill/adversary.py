"""The adversarial term: a patch discriminator that trains alongside the student, learning to tell its frames from the
original's. Off unless it has a weight.

Reference: PatchGAN of arXiv 1611.07004, hinge losses of arXiv 1705.02894. Departure: group norms, which keep frames
independent of one another, so that neither the batch nor the number of processes matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.operators import frames_as_batch
from flashvaed_cli.distill.ranks import Ranks
from flashvaed_cli.errors import DistillationError

Frames = Float[Tensor, "B 3 T H W"]

WIDTH = 64
SMALLEST_SIDE = 24
"""Below it, three halvings and two unpadded layers leave nothing of a frame."""
_NUM_HALVINGS = 3
_SLOPE = 0.2
_NORM_GROUPS = 8
_SEED = 1234


class PatchDiscriminator(nn.Module):
    """Maps frames `[N, 3, H, W]` to a score for each overlapping patch of 70 pixels, `[N, 1, h, w]`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        for index in range(1, _NUM_HALVINGS + 1):
            stride = 2 if index < _NUM_HALVINGS else 1
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(_NORM_GROUPS, 2 * width),
                nn.LeakyReLU(_SLOPE),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1 h w"]:
        """High scores for what looks like the original's."""
        return self.layers(images)


class Adversary:
    """The discriminator, its optimizer, and when it begins.

    Attributes:
        start: the step of the phase at which it begins to learn and its term begins to count.
    """

    def __init__(self, device: torch.device, *, start: int, learning_rate: float, width: int = WIDTH) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self.network = PatchDiscriminator(width).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.9))
        self.start = start

    def has_begun(self, step: int) -> bool:
        """Whether the term counts in this step."""
        return step >= self.start

    def term(self, student: Frames) -> Float[Tensor, ""]:
        """The loss that the student lowers by making frames that score high; no gradient reaches the discriminator.

        Raises:
            DistillationError: the frames are too small for it.
        """
        if min(student.shape[-2:]) < SMALLEST_SIDE:
            raise DistillationError(
                f"the adversarial term judges patches and needs frames of {SMALLEST_SIDE} x {SMALLEST_SIDE} or more, "
                f"not {student.shape[-2]} x {student.shape[-1]}: give a larger --crop-size"
            )
        with _frozen(self.network):
            return -self.network(frames_as_batch(student)).mean()

    def learn(self, student: Frames, teacher: Frames, *, share: float) -> Float[Tensor, ""]:
        """Accumulate the gradient of its hinge loss on one micro-batch, weighted by `share`; returns the loss."""
        with torch.enable_grad():
            real, made = (self.network(frames_as_batch(frames.detach())) for frames in (teacher, student))
            loss = F.relu(1 - real).mean() + F.relu(1 + made).mean()
            (share * loss).backward()
        return loss.detach()

    def step(self, ranks: Ranks) -> None:
        """Update the discriminator with the accumulated gradient."""
        ranks.average_gradients(list(self.network.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Resume from `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through the network, but not into its weights."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
