from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.metrics import roofline
from flashvaed_cli.metrics.roofline import MachineRates, measure_rates, traffic_elements
from tests.toy import original_spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_positive(dtype: torch.dtype) -> None:
    rates = measure_rates("cpu", dtype, budget_s=0.02)
    assert rates.matmul_gflop_per_s > 0 and rates.copy_gbyte_per_s > 0


def test_the_higher_of_two_measurements_counts() -> None:
    assert MachineRates(3.0, 20.0).best(MachineRates(100.0, 12.0)) == MachineRates(100.0, 20.0)


def test_traffic_of_one_latent_frame_by_hand() -> None:
    """Base width 4, latent width 4, one latent frame of 1x1: every layer's input and output, shortcuts once more."""

    def block(in_width: int, out_width: int) -> int:
        return in_width + out_width + 2 * out_width + in_width  # conv1, conv2, the shortcut's input

    mid = 2 * block(16, 16) + (3 * 16 + 8 * 16)
    up0 = 3 * block(16, 16) + 16 + 4 * 8  # one position becomes four
    up1 = 4 * (block(8, 16) + 2 * block(16, 16)) + 4 * 16 + 16 * 8
    up2 = 16 * (3 * block(8, 8)) + 16 * 8 + 64 * 4
    up3, head = 64 * 3 * block(4, 4), 64 * (4 + 3)
    assert traffic_elements(original_spec(), (1, 1, 1)) == 2 * 4 + (4 + 16) + mid + up0 + up1 + up2 + up3 + head


def test_traffic_grows_with_the_clip() -> None:
    spec = wan_decoder_spec(8)
    one, wide = traffic_elements(spec, (1, 2, 2)), traffic_elements(spec, (1, 4, 2))
    assert wide == 2 * one
    first, second, third = (traffic_elements(spec, (t, 2, 2)) for t in (1, 2, 3))
    assert third - second == second - first > one  # a later latent frame becomes four frames


def test_the_faster_of_two_products_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some processors a 1x1 convolution multiplies twice as fast as a matrix product."""
    times = {torch.matmul: 1.0, functional.conv2d: 0.5}
    monkeypatch.setattr(roofline, "_fastest", lambda call, *_: times[call.func])
    monkeypatch.setattr(roofline, "_copy_rate", lambda *_: 1.0)
    assert measure_rates("cpu", torch.float32).matmul_gflop_per_s == 2 * 512**3 / 0.5 / 1e9
