from __future__ import annotations

import math

import pytest
import torch

from flashvaed_cli.metrics.colour import ColourShift, delta_e_2000, srgb_to_lab

# Sharma, Wu and Dalal 2005, table 1: two colours in L*a*b*, and their difference. Chosen there to meet every branch.
_PUBLISHED = (
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0009), 7.1792),
    ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0011), 7.2195),
    ((50.0, -0.001, 2.49), (50.0, 0.0009, -2.49), 4.8045),
    ((50.0, 2.5, 0.0), (50.0, 0.0, -2.5), 4.3065),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
    ((50.0, 2.5, 0.0), (56.0, -27.0, -3.0), 31.9030),
    ((50.0, 2.5, 0.0), (58.0, 24.0, 15.0), 19.4535),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((63.0109, -31.0961, -5.8663), (62.8187, -29.7946, -4.0864), 1.2630),
    ((61.2901, 3.7196, -5.3901), (61.4292, 2.2480, -4.9620), 1.8731),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((90.9257, -0.5406, -0.9208), (88.6381, -0.8985, -0.7239), 1.5381),
    ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
)


@pytest.mark.parametrize(("one", "other", "expected"), _PUBLISHED)
def test_the_published_pairs(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    a, b = (torch.tensor([colour], dtype=torch.float64)[..., None] for colour in (one, other))
    assert float(delta_e_2000(a, b)) == pytest.approx(expected, abs=5e-5)
    assert float(delta_e_2000(b, a)) == pytest.approx(expected, abs=5e-5)


def test_lab_of_known_colours() -> None:
    colours = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, -1], [-1, -1, 1]])[..., None, None]
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    torch.testing.assert_close(srgb_to_lab(colours)[..., 0, 0], expected, atol=0.02, rtol=0)


def test_mean_and_percentile_are_those_of_all_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.rand(6, 3, 40, 60, generator=generator) * 2 - 1 for _ in range(2))
    shift = ColourShift()
    for part in range(0, 6, 2):
        shift.add(one[part : part + 2], other[part : part + 2])
    one, other = one[..., ::2, ::2], other[..., ::2, ::2]
    everything = delta_e_2000(srgb_to_lab(one), srgb_to_lab(other)).flatten().double()
    assert shift.mean == pytest.approx(float(everything.mean()), rel=1e-6)
    assert shift.percentile_95 == pytest.approx(float(everything.quantile(0.95)), abs=0.04)


def test_degenerate_input_is_defined() -> None:
    shift = ColourShift()
    assert shift.mean is None and shift.percentile_95 is None
    flat = torch.full((1, 3, 4, 4), 0.3)
    shift.add(flat, flat)
    assert shift.mean == 0 and shift.percentile_95 == 0
    shift.add(flat * math.nan, flat)
    assert shift.mean is not None and math.isnan(shift.mean)
    assert shift.percentile_95 is not None and math.isnan(shift.percentile_95)
