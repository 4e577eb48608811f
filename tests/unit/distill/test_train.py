from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.loop import train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.objective import choose_terms
from flashvaed_cli.distill.phases import plan_phase_1, plan_phase_2, plan_phase_3
from flashvaed_cli.distill.settings import TrainSettings, learning_rate_at
from flashvaed_cli.errors import DistillationError
from flashvaed_cli.progress import SilentProgress
from tests.unit.distill.small_decoders import batches, pruned_spec, student_decoder, teacher_decoder

NO_LPIPS = LossWeights(lpips=0.0)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in decoder.state_dict().items()}


def changed_stages(before: dict[str, Tensor], decoder: Decoder) -> set[str]:
    return {name.split(".")[1] for name, value in decoder.state_dict().items() if not torch.equal(value, before[name])}


def test_training_brings_the_student_to_its_teacher() -> None:
    student, teacher = student_decoder(), teacher_decoder()
    plan = plan_phase_3(student.spec, teacher.spec)
    settings = TrainSettings(num_steps=30, learning_rate=3e-3, loss_weights=NO_LPIPS, log_every_steps=10)
    frozen = weights_of(teacher)
    result = train(student, teacher, plan, lambda _: batches(0), settings)
    assert [entry["step"] for entry in result.history] == [10, 20, 30]
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert result.history[-1]["psnr_db"] > result.history[0]["psnr_db"] + 1
    assert set(result.history[0]) == {
        "step", "loss", "l1", "ssim", "feature", "psnr_db", "gradient_norm", "learning_rate", "seconds",
    }  # fmt: skip
    assert result.num_steps == 30 and result.resumed_from is None and result.clips_per_s > 0
    assert not changed_stages(frozen, teacher)
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_phase_1_moves_the_converted_deep_stage_and_nothing_else() -> None:
    student, teacher = student_decoder(), teacher_decoder()
    plan = plan_phase_1(student.spec, teacher.spec, shallow_stages=("up2", "up3"))
    before = weights_of(student)
    train(student, teacher, plan, batches, TrainSettings(num_steps=2, loss_weights=NO_LPIPS))
    assert changed_stages(before, student) == {"mid"}


def test_phase_2_raises_r2_and_holds_the_rows_to_be_pruned_still() -> None:
    student, teacher = teacher_decoder(), teacher_decoder()
    plan = plan_phase_2(student.spec, teacher.spec, to_keep={"up2.0": (1, 2), "up2.0.conv1": (0, 3)})
    before = weights_of(student)
    settings = TrainSettings(
        num_steps=12,
        learning_rate=3e-3,
        weight_decay=0.1,
        loss_weights=LossWeights(lpips=0.0, l_ce=10.0),
        log_every_steps=4,
    )
    result = train(student, teacher, plan, lambda _: batches(0), settings)
    assert result.history[-1]["l_ce"] < result.history[0]["l_ce"]
    for layer, kept in (("conv2", (1, 2)), ("conv1", (0, 3))):
        for kind in ("weight", "bias"):
            name = f"stages.up2.0.{layer}.{kind}"
            same = (student.state_dict()[name] == before[name]).flatten(1 if kind == "weight" else 0)
            held = [c for c in range(len(same)) if c not in kept]
            assert bool(same[held].all()), name
            assert not bool(same[list(kept)].all()), name


def test_phase_3_matches_a_pruned_student_through_trained_projections() -> None:
    teacher = teacher_decoder()
    student = Decoder(pruned_spec(teacher.spec, 1))
    maps = {f"up3.{i}": (torch.ones(2, 1), torch.zeros(2)) for i in range(2)}
    plan = plan_phase_3(student.spec, teacher.spec, projections=maps)
    result = train(student, teacher, plan, batches, TrainSettings(num_steps=2, loss_weights=NO_LPIPS))
    assert result.unmatched == () and result.history[-1]["feature"] > 0
    assert torch.equal(maps["up3.0"][0], torch.ones(2, 1))  # the caller's map is only the start


def test_what_is_absent_is_said_in_the_result_and_aloud() -> None:
    teacher = teacher_decoder()
    student = Decoder(pruned_spec(teacher.spec, 1))
    progress = SilentProgress()
    plan = plan_phase_3(student.spec, teacher.spec)
    result = train(student, teacher, plan, batches, TrainSettings(num_steps=1), progress=progress)
    assert result.absent_terms == ("lpips",) and result.unmatched == ("up3.0", "up3.1")
    assert "lpips" in progress.warnings[0] and "up3.0" in progress.warnings[1]
    assert "l_ce" not in result.history[0] and "lpips" not in result.history[0]


def test_a_perceptual_distance_is_fed_images_and_counts() -> None:
    student, teacher = student_decoder(), teacher_decoder()
    seen: list[tuple[int, ...]] = []

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        seen.append(tuple(a.shape))
        return (a - b).square().flatten(1).mean(dim=1)

    plan = plan_phase_3(student.spec, teacher.spec)
    only = LossWeights(l1=0.0, feature=0.0, ssim=0.0, lpips=2.0)
    result = train(
        student, teacher, plan, batches, TrainSettings(num_steps=1, loss_weights=only), perceptual=perceptual
    )
    assert seen == [(6, 3, 12, 12)]
    assert result.history[0]["loss"] == pytest.approx(2 * result.history[0]["lpips"])
    assert result.absent_terms == ()


def test_terms_without_weight_are_not_computed_and_none_is_an_error() -> None:
    teacher = teacher_decoder()
    plan = plan_phase_3(teacher.spec, teacher.spec)
    everything = LossWeights(sharpness=1.0, temporal=1.0)
    assert choose_terms(everything, plan, None) == (("l1", "ssim", "sharpness", "temporal", "feature"), ("lpips",))
    with pytest.raises(DistillationError, match="give l1 a weight"):
        choose_terms(LossWeights(l1=0.0, ssim=0.0, feature=0.0, l_ce=1.0), plan, None)


@pytest.mark.parametrize("change", [{"ema_decay": 0.9}, {"compute_dtype": "bfloat16"}, {"channels_last": True}])
def test_options_train_too(change: dict) -> None:
    student, teacher = student_decoder(), teacher_decoder()
    before = weights_of(student)
    plan = plan_phase_3(student.spec, teacher.spec)
    settings = replace(TrainSettings(num_steps=2, loss_weights=NO_LPIPS), **change)
    train(student, teacher, plan, batches, settings)
    assert changed_stages(before, student) >= {"mid", "up3", "head"}
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in student.parameters())


def test_the_average_of_one_step_lies_between_start_and_end() -> None:
    plain, averaged, teacher = student_decoder(), student_decoder(), teacher_decoder()
    start = weights_of(plain)["stages.mid.0.conv1.weight"]
    plan = plan_phase_3(plain.spec, teacher.spec)
    settings = TrainSettings(num_steps=1, loss_weights=NO_LPIPS)
    train(plain, teacher, plan, batches, settings)
    train(averaged, teacher, plan, batches, replace(settings, ema_decay=0.99))
    end = plain.state_dict()["stages.mid.0.conv1.weight"]
    expected = start.lerp(end, 0.9)  # the first decay is 1 / 10
    assert torch.allclose(averaged.state_dict()["stages.mid.0.conv1.weight"], expected, atol=1e-7)


def test_learning_rate_warms_up_and_falls() -> None:
    settings = TrainSettings(
        num_steps=10, learning_rate=1.0, num_warmup_steps=4, schedule="cosine", final_rate_frac=0.1
    )
    rates = [learning_rate_at(step, settings) for step in range(10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0.1
    assert learning_rate_at(9, replace(settings, schedule="constant")) == 1.0


@pytest.mark.parametrize(
    ("latents", "message"), [(torch.zeros(16, 2, 2, 2), r"\[B, 16"), (torch.zeros(1, 8, 1, 2, 2), r"\[B, 16")]
)
def test_latents_that_do_not_fit_are_refused(latents: Tensor, message: str) -> None:
    student, teacher = student_decoder(), teacher_decoder()
    plan = plan_phase_3(student.spec, teacher.spec)
    with pytest.raises(DistillationError, match=message):
        train(student, teacher, plan, lambda _: (latents,), TrainSettings(num_steps=1, loss_weights=NO_LPIPS))


@pytest.mark.parametrize("weight", [1e300, 1e37])
def test_a_weight_that_takes_the_loss_out_of_range_is_named(weight: float) -> None:
    """Beyond float32 the loss itself, or its gradient; the learning rate has nothing to do with it."""
    student, teacher = student_decoder(), teacher_decoder()
    plan = plan_phase_3(student.spec, teacher.spec)
    settings = TrainSettings(num_steps=1, loss_weights=replace(NO_LPIPS, mse=weight))
    with pytest.raises(
        DistillationError, match=rf"Give --loss-weight mse a smaller value \(now {re.escape(format(weight, 'g'))}"
    ) as caught:
        train(student, teacher, plan, batches, settings)
    assert str(caught.value).endswith(f"Give --loss-weight mse a smaller value (now {weight:g}).")


def test_half_precision_weights_are_refused() -> None:
    student, teacher = student_decoder().to(torch.bfloat16), teacher_decoder()
    plan = plan_phase_3(student.spec, teacher.spec)
    with pytest.raises(DistillationError, match="float32"):
        train(student, teacher, plan, batches, TrainSettings(num_steps=1))
