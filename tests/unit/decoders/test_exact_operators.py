"""Every exact twin against its plain operator: frames, gradients and state, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules import exact_operators, winograd
from flashvaed_cli.decoders.modules.exact_operators import fold_phases
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.modules.operators import Conv, Future, Past, batch_as_frames, build_conv, frames_as_batch
from flashvaed_cli.decoders.predict import winograd_strips
from flashvaed_cli.decoders.spec.layers import (
    CENTRED,
    ConvSpec,
    Kernel,
    Operator,
    SpacePadding,
    TimePadding,
)
from flashvaed_cli.errors import SpecError

TWINS: list[tuple[Operator, Kernel]] = [
    ("tapwise3d", (3, 3, 3)),
    ("tapwise3d", (3, 1, 1)),
    ("tapwise3d", (2, 3, 1)),
    ("tapwise3d", (1, 3, 3)),
    ("stacked3d", (3, 3, 3)),
    ("stacked3d", (2, 1, 3)),
    ("winograd3d", (3, 3, 3)),
    ("winograd3d", (1, 3, 3)),
    ("subpixel2d", (1, 3, 3)),
]
DOUBLE = 1e-12  # float64: the order of the sums; Winograd's transforms cost one digit of the fifteen
SINGLE = 5e-5  # float32, outputs of about 1: measured 1e-6 for sums in another order, 1e-5 for Winograd
HALF = 0.03  # bfloat16 has 8 bits: two roundings of an output of up to 4
twins = pytest.mark.parametrize(("operator", "kernel"), TWINS)


@pytest.fixture(autouse=True, scope="module")
def _small_clips_count() -> Iterator[None]:
    """Use Winograd even where it does not pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "is_worthwhile", lambda *_, **__: True)
        yield


def pair(
    operator: Operator,
    kernel: Kernel,
    in_width: int = 3,
    out_width: int = 5,
    *,
    time_padding: TimePadding = "zeros",
    space_padding: SpacePadding = "zeros",
) -> tuple[Conv, Conv]:
    """A plain layer and its twin over the same parameters, in float64, without gradients."""
    spec = ConvSpec(
        operator=operator,
        in_width=in_width,
        out_width=out_width,
        kernel=kernel,
        time_padding=time_padding,
        space_padding=space_padding,
    )
    plain, twin = (
        build_conv(spec.model_copy(update={"operator": name}), "here").double().requires_grad_(False)
        for name in (spec.plain_operator, operator)
    )
    assert isinstance(plain, Conv) and isinstance(twin, Conv)
    plain.bias.data.normal_()
    twin.load_state_dict(plain.state_dict())  # the same names and shapes
    return plain, twin


def paddings(operator: Operator, kernel: Kernel) -> list[tuple[TimePadding, SpacePadding]]:
    """All that a twin knows."""
    in_time: list[TimePadding] = ["zeros", "first", "edges", "zeros_around"]
    if kernel[0] == 1:
        in_time = ["zeros"]
    elif kernel[0] % 2 == 0 or operator == "stacked3d":
        in_time = ["zeros", "first"]
    in_space: list[SpacePadding] = ["zeros"] if operator == "subpixel2d" else ["zeros", "reflect", "replicate"]
    return [(time, space) for time in in_time for space in in_space]


PADDED = [(operator, kernel, *padding) for operator, kernel in TWINS for padding in paddings(operator, kernel)]


def run_plain(plain: Conv, twin: Conv, x: Tensor, past: Past = None, future: Future = None) -> Tensor:
    """The expected output: the plain layer's, on enlarged frames if the twin enlarges."""
    if twin.spec.enlarges:
        x = batch_as_frames(F.interpolate(frames_as_batch(x), scale_factor=2, mode="nearest"), x)
    return plain(x, past, future)


def assert_same(found: Tensor, expected: Tensor, bound: float = DOUBLE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@given(
    twin=st.sampled_from(PADDED),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
    later_chunk=st.booleans(),
)
def test_same_frames_and_state(
    twin: tuple[Operator, Kernel, TimePadding, SpacePadding],
    widths: tuple[int, int],
    shape: tuple[int, int, int, int],
    channels_last: bool,
    later_chunk: bool,
) -> None:
    operator, kernel, in_time, in_space = twin
    plain, exact = pair(operator, kernel, *widths, time_padding=in_time, space_padding=in_space)
    b, t, h, w = shape
    if in_space == "reflect":
        h, w = h + 1, w + 1  # one position has no neighbour to be mirrored
    x = torch.randn(b, widths[0], t, h, w, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    past: dict[str, Tensor] | None = None
    if later_chunk and in_time not in CENTRED:
        past = {"here": torch.randn(b, widths[0], kernel[0] - 1, h, w, dtype=torch.float64)}
    expected_future: dict[str, Tensor] = {}
    future: dict[str, Tensor] = {}
    with torch.no_grad():
        expected = run_plain(plain, exact, x, past, expected_future)
        assert_same(exact(x, past, future), expected)
    assert future.keys() == expected_future.keys()
    assert all(torch.equal(future[key], expected_future[key]) for key in future)


@given(
    twin=st.sampled_from([twin for twin in PADDED if twin[2] not in CENTRED]),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_chunks_give_the_frames_of_the_whole(
    twin: tuple[Operator, Kernel, TimePadding, SpacePadding], chunks: list[int]
) -> None:
    _, exact = pair(*twin[:2], time_padding=twin[2], space_padding=twin[3])
    x = torch.randn(1, 3, sum(chunks), 5, 4, dtype=torch.float64)
    found = []
    past: Past = None
    for part in x.split(chunks, dim=2):
        future: dict[str, Tensor] = {}
        found.append(exact(part, past, future))
        past = future
        for kept in future.values():
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()  # no view of the chunk
    assert_same(torch.cat(found, dim=2), exact(x))


@pytest.mark.parametrize("operator", ["tapwise3d", "winograd3d", "stacked3d"])
def test_frames_too_small_to_be_mirrored_are_refused(operator: Operator) -> None:
    _, exact = pair(operator, (3, 3, 3), space_padding="reflect")
    with pytest.raises(SpecError, match="1x6 positions are too few"):
        exact(torch.zeros(1, 3, 2, 1, 6, dtype=torch.float64))


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("space_padding", ["zeros", "reflect", "replicate"])
def test_wide_kernels_are_not_laid_out_again(
    monkeypatch: pytest.MonkeyPatch, space_padding: SpacePadding, few: int
) -> None:
    monkeypatch.setattr(exact_operators, "WIDE_KERNEL", 1)
    monkeypatch.setattr(exact_operators, "FEW_POSITIONS", few)
    for kernel in ((3, 3, 3), (2, 3, 1)):
        plain, exact = pair("tapwise3d", kernel, time_padding="first", space_padding=space_padding)
        x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
        expected = plain(x)
        assert_same(use_channels_last(exact)(channels_last(x)), expected)
        assert_same(exact(x), expected)


@twins
@pytest.mark.parametrize("later_chunk", [False, True])
def test_same_gradients(operator: Operator, kernel: Kernel, later_chunk: bool) -> None:
    plain, exact = (layer.requires_grad_() for layer in pair(operator, kernel))
    x = torch.randn(2, 3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    past = {"here": torch.randn(2, 3, kernel[0] - 1, 6, 5, dtype=torch.float64)} if later_chunk else None
    weights = torch.randn_like(run_plain(plain, exact, x, past))
    (run_plain(plain, exact, x, past) * weights).sum().backward()
    expected = [x.grad, plain.weight.grad, plain.bias.grad]
    x.grad = None
    (exact(x, past) * weights).sum().backward()
    for found, wanted in zip([x.grad, exact.weight.grad, exact.bias.grad], expected, strict=True):
        assert found is not None and wanted is not None
        assert_same(found, wanted, 1e-10)  # sums over some hundred positions


@twins
def test_float32(operator: Operator, kernel: Kernel) -> None:
    plain, exact = (layer.float().requires_grad_(False) for layer in pair(operator, kernel, 32, 24))
    x = torch.randn(1, 32, 3, 12, 12)
    assert_same(exact(x), run_plain(plain, exact, x), SINGLE)


@twins
def test_bfloat16(operator: Operator, kernel: Kernel) -> None:
    plain, exact = pair(operator, kernel, 16, 8)
    x = torch.randn(1, 16, 3, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        found = exact.bfloat16()(x)
        rounded = plain.bfloat16().double()  # the same rounded weights, exact sums
        expected = run_plain(rounded, exact, x.double())
    assert found.dtype == torch.bfloat16
    assert_same(found.double(), expected, HALF)


@torch.no_grad()
@pytest.mark.parametrize("space_padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("height", [9, 12, 25, 27])
def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch, height: int, space_padding: SpacePadding) -> None:
    plain, exact = pair("winograd3d", (3, 3, 3), space_padding=space_padding)
    x = torch.randn(1, 3, 2, height, 6, dtype=torch.float64)
    monkeypatch.setattr(winograd_strips, "MOST_ELEMENTS", 36 * 3 * 4 * 3)  # strips of 3 rows, the last of 1
    assert winograd_strips.rows_per_strip(7, 4, 3, 36 * 3 * 15) == 3
    assert_same(exact(x), plain(x))


@torch.no_grad()
def test_parts_of_a_large_kernel_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, exact = pair("winograd3d", (3, 3, 3), 2, 40)
    x = torch.randn(1, 2, 2, 9, 6, dtype=torch.float64)
    monkeypatch.setattr(winograd_strips, "WHOLE_KERNEL_ELEMENTS", 0)
    monkeypatch.setattr(winograd_strips, "MOST_ELEMENTS", 1)
    monkeypatch.setattr(winograd_strips, "OUTPUTS_AT_ONCE", 16)  # parts of 16, 16 and 8
    assert winograd_strips.rows_per_strip(3, 4, 2, 36 * 3 * 80) == 3  # else one row at a time
    assert_same(exact(x), plain(x))


@torch.no_grad()
def test_few_tiles_are_summed_over_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, exact = pair("winograd3d", (3, 3, 3), 96, 96)
    monkeypatch.setattr(winograd, "is_worthwhile", winograd_strips.is_worthwhile)
    calls: list[int] = []
    original = winograd.winograd_conv

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(winograd, "winograd_conv", counted)
    for side, expected in ((8, 0), (96, 1)):
        x = torch.randn(1, 96, 3, side, side, dtype=torch.float64)
        assert_same(exact(x), plain(x))
        assert len(calls) == expected


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_plain_layer(kernel: Kernel, num_frames: int, dtype: torch.dtype) -> None:
    """On one thread too: torch's gradient of Winograd's own convolution is wrong there for a single tap in float32."""
    plain, exact = (layer.to(dtype).requires_grad_() for layer in pair("winograd3d", kernel, 8, 16))
    x = torch.randn(1, 8, num_frames, 32, 32, dtype=dtype)
    expected, found = (
        torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())) for layer in (plain, exact)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


def test_when_winograd_pays() -> None:
    """Measured: with a thousand tiles of wide layers, not for one frame of few channels with its past."""
    pays = winograd_strips.is_worthwhile
    assert pays(192, 192, 3, num_inputs=9, num_outputs=9, num_tiles=1024)
    assert pays(384, 384, 3, num_inputs=3, num_outputs=3, num_tiles=64)
    assert not pays(96, 96, 3, num_inputs=3, num_outputs=1, num_tiles=256)
    assert not pays(1024, 1024, 3, num_inputs=4, num_outputs=4, num_tiles=16)
    assert not pays(16, 16, 3, num_inputs=9, num_outputs=9, num_tiles=4096)


def test_a_changed_weight_counts_at_once() -> None:
    for operator, kernel in TWINS:
        plain, exact = pair(operator, kernel)
        x = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
        with torch.no_grad():
            exact(x)
            exact.weight.mul_(2.0)
            plain.weight.mul_(2.0)
            assert_same(exact(x), run_plain(plain, exact, x))


def test_phases_are_summed_in_float32() -> None:
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    weight[0, 0, 1:, 1:] = torch.tensor([[1.0, 2**-9], [2**-9, 2**-8]])  # each sum of two is rounded off, all four not
    assert float(fold_phases(weight)[0, 0, 0, 0, 1, 1]) == 1 + 2**-7


@twins
def test_traced_without_strips_or_breaks(operator: Operator, kernel: Kernel) -> None:
    _, exact = pair(operator, kernel)
    x = torch.randn(1, 3, 2, 9, 5, dtype=torch.float64)
    past = {"here": torch.randn(1, 3, kernel[0] - 1, 9, 5, dtype=torch.float64)}
    with torch.no_grad():
        traced = torch.export.export(exact, (x, past), strict=False).module()
        assert_same(traced(x, past), exact(x, past))
