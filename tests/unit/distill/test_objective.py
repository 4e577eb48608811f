"""Ways to compute the same gradients: recomputed activations, exact operators, half precision."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill import objective as objective_module
from flashvaed_cli.distill.features import FeatureMatcher
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.objective import prepare_objective
from flashvaed_cli.distill.ranks import ALONE
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DecodeError
from tests.unit.distill.small_decoders import batches, teacher_decoder
from tests.unit.distill.trained_elsewhere import phase_2

WEIGHTS = LossWeights(lpips=0.0, sharpness=1.0, energy=1.0, temporal=1.0)
PLAIN = TrainSettings(num_steps=1, loss_weights=WEIGHTS)


def gradients(settings: TrainSettings) -> dict[str, Tensor]:
    """Of a step of phase 2, whose L_ce looks inside a block."""
    teacher = teacher_decoder(base_width=8)  # norms over two channels come near zero and blow rounding up
    torch.manual_seed(8)
    student = Decoder(teacher.spec)  # far from its teacher: no difference of frames is itself only rounding
    plan = phase_2(student)
    objective = prepare_objective(
        student, teacher, plan, FeatureMatcher(plan.matches), settings, perceptual=None, ranks=ALONE
    )
    loss, values = objective(batches(0)[0])
    loss.backward()
    assert set(values) == {"loss", "l1", "ssim", "sharpness", "energy", "temporal", "feature", "l_ce", "clamped_error"}
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients() -> None:
    kept, recomputed = gradients(PLAIN), gradients(replace(PLAIN, checkpoint_activations=True))
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (apart / sum(float(value.square().sum()) for value in other.values())) ** 0.5


def test_exact_operators_give_the_gradients_of_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    half_precision = replace(PLAIN, compute_dtype="bfloat16")
    exact, exact_half = gradients(PLAIN), gradients(half_precision)
    monkeypatch.setattr(objective_module, "exact_decoder", lambda decoder, **_: decoder)
    plain, plain_half = gradients(PLAIN), gradients(half_precision)
    assert exact.keys() == plain.keys()
    assert relative_difference(exact, plain) < 5e-5  # of float32; 2e-6 was measured
    # Rounding to 8 bits costs what it costs with plain operators: no transform loses further digits.
    assert relative_difference(exact_half, plain) < 1.5 * relative_difference(plain_half, plain)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(DecodeError, match=r"C\+\+ compiler"):
        gradients(replace(PLAIN, compile=True))


@pytest.mark.bench
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing to compile with")
def test_compiled_blocks_give_the_same_gradients() -> None:
    assert relative_difference(gradients(replace(PLAIN, compile=True)), gradients(PLAIN)) < 1e-4
