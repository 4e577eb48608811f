from __future__ import annotations

import pytest
import torch
from torch import nn

from flashvaed_cli.distill.loop import train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.parameter_groups import parameter_groups
from flashvaed_cli.distill.phases import plan_phase_3
from flashvaed_cli.distill.settings import TrainSettings
from tests.unit.distill.small_decoders import batches, student_decoder, teacher_decoder

SETTINGS = TrainSettings(num_steps=1, learning_rate=1e-3, max_relative_step=0.01, loss_weights=LossWeights(lpips=0.0))


def test_a_step_is_at_most_a_fraction_of_the_weights() -> None:
    usual, tiny, zero = (nn.Parameter(torch.full((4, 3), size)) for size in (0.5, 1e-3, 0.0))
    bias, projection = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.full((4, 3), 1e-3))
    parameters = {"usual": usual, "tiny": tiny, "zero": zero, "bias": bias}
    groups = parameter_groups(parameters, [projection], held=["bias"], settings=SETTINGS)
    scales = {id(member): group["rate_scale"] for group in groups for member in group["params"]}
    assert scales[id(usual)] == scales[id(bias)] == scales[id(projection)] == 1.0
    assert scales[id(tiny)] == 2.0**-7  # the power of two below 0.01 x 1e-3 / 1e-3
    assert 0 < scales[id(zero)] < scales[id(tiny)]
    (held,) = [group for group in groups if group.get("weight_decay") == 0.0]
    assert held["params"] == [bias]


@pytest.mark.parametrize("limit", [0.01, None])
def test_tiny_weights_move_a_little_at_a_time(limit: float | None) -> None:
    student, teacher = student_decoder(), teacher_decoder()
    name = "stages.up0.0.conv2.weight"
    with torch.no_grad():
        student.get_parameter(name).mul_(1e-3)
    before = student.get_parameter(name).detach().clone()
    settings = TrainSettings(
        num_steps=1, learning_rate=1e-3, max_relative_step=limit, loss_weights=SETTINGS.loss_weights
    )
    train(student, teacher, plan_phase_3(student.spec, teacher.spec), batches, settings)
    moved = (student.get_parameter(name).detach() - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert (0 < float(moved) < 0.0101) is (limit is not None)  # AdamW's first step is the learning rate in each weight
