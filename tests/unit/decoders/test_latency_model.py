from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.decoders.predict.latency import (
    BlockLatency,
    WidthLatency,
    block_axes,
    rounded_ladder,
    width_ladder,
)
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.families.wan21.spec import wan_decoder_spec

SPEC = wan_decoder_spec(16)


def shallow(*stages: str) -> list:
    return [group for group in channel_groups(SPEC) if group.stage in stages]


def table(widths: tuple[tuple[float, ...], ...], power: float = 1.0) -> BlockLatency:
    """Times that are a power of the product of the coordinates."""
    names = [("a",), ("b",)][: len(widths)]
    values = []
    for point in itertools.product(*widths):
        product = 1.0
        for value in point:
            product *= value
        values.append(product**power)
    return BlockLatency("up3.0", tuple(names), widths, tuple(values))


def test_ladders_of_known_widths() -> None:
    assert width_ladder(96) == (96, 64, 48, 32, 24, 16, 12)
    assert width_ladder(16) == (16, 12, 8, 6, 4, 3, 2)
    assert width_ladder(4) == (4, 3, 2, 1)
    assert width_ladder(1) == (1,)
    assert rounded_ladder(width_ladder(96), 8) == (96, 64, 48, 32, 24, 16)
    assert rounded_ladder(width_ladder(16), 5) == (16, 15, 10, 5)


@given(st.integers(1, 1024), st.integers(1, 64))
def test_a_ladder_falls_from_the_full_width_to_an_eighth(width: int, round_to: int) -> None:
    ladder = rounded_ladder(width_ladder(width), round_to)
    assert ladder[0] == width
    assert list(ladder) == sorted(set(ladder), reverse=True)
    assert all(rung % round_to == 0 and 8 * rung >= width for rung in ladder[1:])
    assert all(rung % 8 == 0 for rung in width_ladder(width)[1:] if rung > 16)


def test_axes_of_the_shallow_stages() -> None:
    assert block_axes(SPEC, shallow("up2", "up3")) == {
        "up1.3": (("up2.stream",),),
        "up2.0": (("up2.stream",), ("up2.0.inner",)),
        "up2.1": (("up2.stream",), ("up2.1.inner",)),
        "up2.2": (("up2.stream",), ("up2.2.inner",)),
        "up2.3": (("up2.stream",), ("up3.stream",)),
        "up3.0": (("up3.stream",), ("up3.0.inner",)),
        "up3.1": (("up3.stream",), ("up3.1.inner",)),
        "up3.2": (("up3.stream",), ("up3.2.inner",)),
        "head.0": (("up3.stream",),),
    }


def test_an_entry_of_its_own_shares_the_axis_of_the_stream() -> None:
    axes = block_axes(SPEC, shallow("up1"))
    assert axes["up0.3"] == (("up1.entry",),)
    assert axes["up1.0"] == (("up1.entry", "up1.stream"), ("up1.0.inner",))


@given(st.integers(4, 32), st.integers(2, 16), st.floats(0.1, 3.0))
def test_powers_of_the_width_are_met_everywhere(a: int, b: int, power: float) -> None:
    block = table(((4.0, 32.0), (2.0, 8.0, 16.0)), power)
    # 1e-9: float64 logarithms.
    assert block({"a": a, "b": b}) == pytest.approx((a * b) ** power, rel=1e-9)


def test_on_the_grid_the_measured_value_comes_back() -> None:
    block = BlockLatency("up3.0", (("a",), ("b",)), ((2.0, 4.0), (1.0, 8.0)), (5.0, 3.0, 70.0, 20.0))
    assert [block({"a": a, "b": b}) for a in (2, 4) for b in (1, 8)] == pytest.approx([5.0, 3.0, 70.0, 20.0])
    assert block({"a": 4, "b": 3}) < 70.0


@pytest.mark.parametrize("width", [3, 33])
def test_widths_outside_the_grid_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"up3\.0: .* is outside what was measured"):
        table(((4.0, 32.0),))({"a": width})


def test_values_that_fill_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill the grid"):
        BlockLatency("up3.0", (("a",),), ((1.0, 2.0),), (1.0,))


def test_a_model_adds_its_blocks() -> None:
    block = BlockLatency("up1.0", (("up1.entry", "up1.stream"), ("i",)), ((2.0, 4.5), (1.0,)), (5.0, 3.0))
    model = WidthLatency(7.0, (block,), {"up1.entry": (4, 2), "i": (1,)})
    assert model({"up1.entry": 2, "up1.stream": 2, "i": 1}) == pytest.approx(12.0)
