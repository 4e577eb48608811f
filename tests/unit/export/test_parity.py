from __future__ import annotations

import pytest
import torch
from small_decoders import flash_spec, short_spec, small_decoder

from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.parity import (
    ROUNDING_FACTOR,
    own_rounding,
    relative_difference,
    require_parity,
    seeded_latents,
)


def test_latents_are_seeded_and_scaled_per_channel() -> None:
    mean, std = [float(i) for i in range(16)], [0.0] * 16
    latents = seeded_latents(short_spec(), (2, 3, 4), latent_mean=mean, latent_std=std)
    assert latents.shape == (1, 16, 2, 3, 4)
    assert latents[0, :, 1, 2, 3].tolist() == mean
    assert torch.equal(seeded_latents(short_spec(), (2, 3, 4)), seeded_latents(short_spec(), (2, 3, 4)))


def test_difference_is_a_fraction_of_the_range() -> None:
    expected = torch.tensor([-1.0, 0.0, 3.0])
    assert relative_difference(expected + torch.tensor([0.0, 0.4, 0.0]), expected) == pytest.approx(0.1)
    assert relative_difference(torch.tensor([2.2]), torch.tensor([2.0])) == pytest.approx(0.1)  # constant
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0.0


def test_other_shape_or_nan_is_no_parity() -> None:
    with pytest.raises(ExportError, match=r"\[3\].*\[2\]"):
        relative_difference(torch.zeros(3), torch.zeros(2))
    difference = relative_difference(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ExportError, match="nan"):
        require_parity(difference, 1e-4, where="the file")
    require_parity(1e-4, 1e-4, where="the file")


def test_rounding_is_that_of_the_number_format() -> None:
    decoder = small_decoder(flash_spec())
    latents = seeded_latents(decoder.spec, (2, 3, 3))
    single, half = (own_rounding(decoder, latents, dtype) for dtype in (torch.float32, torch.float16))
    assert 1e-8 < single < 1e-5 < half < 1e-1


def test_what_is_allowed() -> None:
    asked: list[int] = []

    def rounding() -> float:
        asked.append(1)
        return 1e-3

    assert require_parity(1e-4, 1e-4, where="it", rounding=rounding) == 1e-4 and not asked
    assert require_parity(5e-3, 1e-4, where="it", rounding=rounding) == pytest.approx(ROUNDING_FACTOR * 1e-3)
    message = (
        r"it differs .* 0\.009 .*tolerance 0\.008; rounding alone moves the decoder by 0\.001.* not written\. Do that"
    )
    with pytest.raises(ExportError, match=message):
        require_parity(9e-3, 1e-4, where="it", rounding=rounding, advice="Do that")
