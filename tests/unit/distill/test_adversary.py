"""The adversarial term: it begins when it should, learns to tell frames apart, and survives a kill bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.adversary import Adversary, PatchDiscriminator
from flashvaed_cli.distill.loop import train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import plan_phase_3
from flashvaed_cli.distill.ranks import ALONE
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DistillationError, Interrupted
from tests.unit.distill.small_decoders import pruned_spec, teacher_decoder

TEACHER = teacher_decoder()
SIDE = 6  # latents: 48 pixels
SETTINGS = TrainSettings(
    num_steps=4,
    learning_rate=1e-3,
    loss_weights=LossWeights(l1=1.0, lpips=0.0, feature=0.0, ssim=0.0, l_ce=0.0, adversarial=0.1),
    adversarial_start=1,
    log_every_steps=1,
    checkpoint_every_steps=1,
)


def batches(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(1, TEACHER.spec.latent_width, 2, SIDE, SIDE, generator=generator) for _ in range(2)]


def run(path: Path | None = None, *, source=batches, **changes):
    torch.manual_seed(3)
    student = Decoder(pruned_spec(TEACHER.spec, 1))
    plan = plan_phase_3(student.spec, TEACHER.spec)
    result = train(student, TEACHER, plan, source, replace(SETTINGS, **changes), checkpoint_path=path, resume=True)
    return student, result


def test_patches_of_70_pixels_have_a_score() -> None:
    network = PatchDiscriminator(8)
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = network(image)
    assert scores.shape == (1, 1, 14, 14)
    for module in network.modules():  # group norms span the frame: without them, the reach of one score is its patch
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    network(image)[0, 0, 7, 7].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_it_learns_to_tell_frames_apart() -> None:
    adversary = Adversary(torch.device("cpu"), start=0, learning_rate=1e-3, width=8)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        sharp = torch.randn(2, 3, 2, 32, 32, generator=generator)
        soft = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), stride=1, padding=(0, 1, 1))
        losses.append(float(adversary.learn(soft, sharp, share=1.0)))
        adversary.step(ALONE)
    assert losses[-1] < 0.5 * losses[0]
    assert adversary.term(soft) > adversary.term(sharp)


def test_its_term_counts_from_its_start() -> None:
    _, result = run()
    terms = [entry["adversarial"] for entry in result.history]
    assert terms[0] == 0 and all(term != 0 for term in terms[1:])
    assert [entry["discriminator"] > 0 for entry in result.history] == [False, True, True, True]
    without, _ = run(loss_weights=replace(SETTINGS.loss_weights, adversarial=0.0))
    late, _ = run(adversarial_start=4)
    early, _ = run()
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), late.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(without.parameters(), early.parameters(), strict=True))


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, _ = run()

    def killed(step: int) -> list[torch.Tensor]:
        if step == 3:
            raise Interrupted("killed", 15)
        return batches(step)

    with pytest.raises(Interrupted):
        run(tmp_path / "x.ckpt", source=killed)
    resumed, result = run(tmp_path / "x.ckpt")
    assert result.resumed_from == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_small_frames_are_refused() -> None:
    adversary = Adversary(torch.device("cpu"), start=0, learning_rate=1e-3, width=8)
    with pytest.raises(DistillationError, match=r"24 x 24 or more, not 16 x 32: give a larger --crop-size"):
        adversary.term(torch.zeros(1, 3, 1, 16, 32))
