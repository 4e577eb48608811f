from __future__ import annotations

import copy
import io
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashvaed_cli.distill.loop import train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import plan_phase_2
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.distill.soap import Soap, axes_of, rotate
from tests.unit.distill.small_decoders import batches, teacher_decoder


def take_steps(parameters: list[nn.Parameter], optimizer: Soap, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def some_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((6, 5, 3, 3), (6,), (5, 1, 3, 3, 3), (4, 7))]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_rotation_keeps_lengths_and_can_be_undone(shape: list[int], rotated: list[bool]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    bases = [
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        if turn
        else torch.empty(0)
        for size, turn in zip(shape, rotated, strict=False)
    ]
    turned = rotate(x, bases)
    torch.testing.assert_close(turned.norm(), x.norm())
    torch.testing.assert_close(rotate(turned, bases, back=True), x)


def test_a_kernels_taps_are_one_axis() -> None:
    assert [axes_of(parameter) for parameter in some_parameters()] == [(6, 5, 9), (6,), (5, 27), (4, 7)]


def test_without_rotation_it_is_adam() -> None:
    ours, theirs = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    # The first gradient only begins the bases.
    soap = Soap([ours], lr=1e-2, betas=(0.9, 0.99), max_axis=0, weight_decay=0.1)
    ours.grad = torch.ones(3, 4)
    soap.step()
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.1)
    for step in range(20):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        soap.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_it_resumes_bit_for_bit() -> None:
    whole, half = some_parameters(), some_parameters()
    take_steps(whole, Soap(whole), 0, 25)
    optimizer = Soap(half)
    take_steps(half, optimizer, 0, 12)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    resumed = Soap(half)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    take_steps(half, resumed, 12, 25)
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_correlated_inputs_slow_it_down_less_than_adamw() -> None:
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(16, 16))[0] * torch.logspace(0, -2, 16)
    x = torch.randn(512, 16) @ mixing @ torch.linalg.qr(torch.randn(16, 16))[0]
    start, target = torch.randn(4, 16), x @ torch.randn(4, 16).T

    def last_loss(make: type[torch.optim.Optimizer], learning_rate: float) -> float:
        weight = nn.Parameter(start.clone())
        optimizer = make([weight], lr=learning_rate)  # type: ignore[call-arg]
        loss = torch.zeros(())
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / 300)
            optimizer.zero_grad()
            loss = (x @ weight.T - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    rates = (1e-2, 3e-2, 1e-1)
    soap, adamw = (min(last_loss(make, rate) for rate in rates) for make in (Soap, torch.optim.AdamW))
    assert soap < 0.2 * adamw


def test_phase_2_holds_the_rows_of_channels_to_go() -> None:
    teacher = teacher_decoder()
    student = copy.deepcopy(teacher)
    kept = (0,)
    plan = plan_phase_2(student.spec, teacher.spec, to_keep={"up3.0.conv1": kept})
    settings = TrainSettings(
        num_steps=4, optimizer="soap", learning_rate=1e-3, loss_weights=LossWeights(lpips=0.0, l_ce=1.0)
    )
    before = copy.deepcopy(student.state_dict())
    train(student, teacher, plan, batches, settings)
    after: dict[str, Tensor] = student.state_dict()
    for name in ("stages.up3.0.conv1.weight", "stages.up3.0.conv1.bias"):
        held = [i for i in range(len(before[name])) if i not in kept]
        assert torch.equal(before[name][held], after[name][held])
        assert not torch.equal(before[name][list(kept)], after[name][list(kept)])
    assert any(not torch.equal(a, b) for a, b in itertools.islice(zip(before.values(), after.values(), strict=True), 4))
