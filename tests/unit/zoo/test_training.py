"""The teacher's training loop on a tiny VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.modules.operators import ChannelRMSNorm
from flashvaed_cli.errors import DistillationError, SpecError
from flashvaed_cli.families.wan21.spec import wan_decoder_spec, wan_encoder_spec
from tests.teacher.linear_start import start_linear
from tests.teacher.training import (
    Autoencoder,
    ImagePath,
    RunState,
    TrainingPlan,
    fast_norms,
    orthogonalise,
    start_state,
    train,
)


class _Noise:
    """Alternates images and clips of 5 frames."""

    def __init__(self) -> None:
        self._num_drawn = 0

    def draw(self, progress: float, rng: torch.Generator) -> Tensor:
        num_frames = (1, 5)[int(torch.randint(2, (1,), generator=rng))]
        return torch.rand(1, 3, num_frames, 16, 16, generator=rng) * 2 - 1


def _coders(base_width: int = 4) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder(wan_encoder_spec(base_width)), Decoder(wan_decoder_spec(base_width))


def _plan(max_steps: int) -> TrainingPlan:
    # A budget this long keeps the rate and the phase of the schedule the same whatever the clock says.
    return TrainingPlan(budget_s=1e9, max_steps=max_steps, autocast=False, kl_from=0.0, log_every_s=1e9)


def _run(path: Path, max_steps: int) -> RunState:
    plan = _plan(max_steps)
    return train(start_state(*_coders(), plan), _Noise(), plan, checkpoint=path, log=[].append)


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole.pt", 2)
    _run(tmp_path / "parts.pt", 1)
    resumed = _run(tmp_path / "parts.pt", 2)
    assert resumed.step == whole.step == 2
    for name, value in whole.autoencoder.state_dict().items():
        # The rate depends on elapsed time over the budget: equal but for 1e-9 of the schedule.
        torch.testing.assert_close(resumed.autoencoder.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(resumed.ema[name], whole.ema[name], rtol=1e-5, atol=1e-7)


def test_training_moves_every_weight_it_reaches(tmp_path: Path) -> None:
    before = Autoencoder(*_coders()).state_dict()
    after = _run(tmp_path / "run.pt", 2).autoencoder.state_dict()
    assert sum(bool((after[name] != before[name]).any()) for name in before) > 0.9 * len(before)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _run(tmp_path / "run.pt", 1)
    plan = _plan(2)
    with pytest.raises(DistillationError, match=r"run\.pt does not continue this run"):
        train(start_state(*_coders(8), plan), _Noise(), plan, checkpoint=tmp_path / "run.pt")


def test_image_path_equals_the_full_network() -> None:
    autoencoder = Autoencoder(*_coders())
    images = torch.rand(2, 3, 1, 16, 16) * 2 - 1
    for fast, full in zip(ImagePath(autoencoder)(images), autoencoder(images), strict=True):
        torch.testing.assert_close(fast, full)  # the same sums in another order: default float32 tolerance


def test_fast_norm_has_the_value_and_gradient_of_the_norm() -> None:
    norm = ChannelRMSNorm(6).double()
    x = torch.randn(2, 6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    with fast_norms():
        assert torch.autograd.gradcheck(norm, (x,))
        fast = norm(x)
    torch.testing.assert_close(fast.float(), norm(x).float())  # ChannelRMSNorm itself computes in float32


def test_orthogonalise_flattens_the_spectrum() -> None:
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    for candidate in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalise(candidate))
        assert values.min() > 0.5 and values.max() < 1.3  # the range of the quintic's fixed cycle


def test_linear_start_already_reconstructs_smooth_clips() -> None:
    encoder, decoder = _coders(8)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 3, 4, 4, generator=generator) * 2 - 1
    clips = torch.nn.functional.interpolate(coarse, size=(5, 32, 32), mode="trilinear", align_corners=True)
    start_linear(encoder, decoder, clips)
    with torch.no_grad():
        output = decoder(encoder(clips).chunk(2, dim=1)[0])
    # 7 dB: what 8-pixel cells of a few random, fast moving gradients allow; random weights give below 0 dB
    assert (output - clips).square().mean() < 0.2 * clips.var()


def test_linear_start_refuses_a_narrow_vae() -> None:
    with pytest.raises(SpecError, match="base width of at least 8, not 4"):
        start_linear(*_coders(4), torch.zeros(1, 3, 5, 16, 16))
