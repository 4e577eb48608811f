from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.decoders.modules.operators import build_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, Kernel
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.surgery.rows import dense_rows_per_clip, gather_patches, gather_rows, sample_positions


@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("causal3d", (3, 3, 3)),
        ("causal3d", (3, 1, 1)),
        ("frame2d", (1, 3, 3)),
        ("frame2d", (1, 5, 1)),
        ("pointwise", (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("max_rows", [7, 1000])
def test_patches_times_weight_is_the_layer(operator: Operator, kernel: Kernel, max_rows: int) -> None:
    layer = build_conv(ConvSpec(operator=operator, in_width=3, out_width=4, kernel=kernel), "here").double()
    layer.requires_grad_(False)
    layer.bias.normal_()
    x = torch.randn(2, 3, 4, 3, 5, dtype=torch.float64)
    positions = sample_positions((2, 4, 3, 5), max_rows, torch.Generator().manual_seed(0))
    found = gather_patches(x, kernel, positions).flatten(1) @ layer.weight.flatten(1).T + layer.bias
    # Float64 sums in another order.
    torch.testing.assert_close(found, gather_rows(layer(x), positions), rtol=0, atol=1e-12)


def test_rows_are_in_the_order_of_the_positions() -> None:
    y = torch.arange(2 * 3 * 2 * 2 * 2).float().view(2, 3, 2, 2, 2)
    rows = gather_rows(y, torch.tensor([0, 1, 9]))
    assert torch.equal(rows, torch.stack([y[0, :, 0, 0, 0], y[0, :, 0, 0, 1], y[1, :, 0, 0, 1]]))


@given(shape=st.tuples(*[st.integers(1, 4)] * 4), max_rows=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_positions_are_distinct_ascending_and_seeded(
    shape: tuple[int, int, int, int], max_rows: int, seed: int
) -> None:
    total = shape[0] * shape[1] * shape[2] * shape[3]
    positions = sample_positions(shape, max_rows, torch.Generator().manual_seed(seed))
    assert len(positions) == min(total, max_rows)
    assert bool((positions.diff() > 0).all())
    assert int(positions.min()) >= 0 and int(positions.max()) < total
    assert torch.equal(positions, sample_positions(shape, max_rows, torch.Generator().manual_seed(seed)))


@given(num_features=st.integers(1, 20_000), num_clips=st.integers(1, 64))
def test_rows_are_enough_for_the_unknowns_and_not_wasted(num_features: int, num_clips: int) -> None:
    rows = dense_rows_per_clip(num_features, num_clips) * num_clips
    assert rows >= 8 * (num_features + 1)
    assert rows < 128 * (num_features + 1) + num_clips
