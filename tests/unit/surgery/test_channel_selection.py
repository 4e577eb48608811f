from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.groups import channel_groups, tensor_widths
from flashvaed_cli.errors import CalibrationError, SpecError
from flashvaed_cli.numerics.selection import SELECTION_RULES, r2_of_set
from flashvaed_cli.surgery.selection import group_covariance, num_kept_channels, select_channels
from tests.toy import original_spec


def random_covariances(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    covariances = {}
    for tensor, width in tensor_widths(original_spec()).items():
        rows = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
        covariances[tensor] = rows.T @ rows / len(rows) * 10.0 ** float(torch.randn((), generator=generator))
    return covariances


COVARIANCES = random_covariances()


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_group_of_the_named_stages_keeps_its_share(rule: str) -> None:
    spec = original_spec()
    kept, report = select_channels(spec, COVARIANCES, {"up2": 0.5, "up3": 0.25, "mid": 0.75}, rule=rule)
    groups = {group.name: group for group in channel_groups(spec) if group.stage in ("up2", "up3", "mid")}
    assert [one.group for one in report] == list(groups)
    assert set(kept) == {tensor for group in groups.values() for tensor in group.tensors}
    for one in report:
        group = groups[one.group]
        ratio = {"up2": 0.5, "up3": 0.25, "mid": 0.75}[group.stage]
        assert len(one.kept) == round(group.width * ratio) and one.width == group.width
        assert list(one.kept) == sorted(set(one.kept)) and one.kept[0] >= 0 and one.kept[-1] < group.width
        assert {kept[tensor] for tensor in group.tensors} == {one.kept}
        assert one.r2 == pytest.approx(r2_of_set(group_covariance(group, COVARIANCES), one.kept))
        assert 0.0 < one.r2 <= 1.0


def test_keeping_all_prunes_nothing() -> None:
    assert select_channels(original_spec(), COVARIANCES, {"up2": 1.0}, rule="greedy-r2") == ({}, [])


def test_tensors_of_a_group_weigh_the_same() -> None:
    group = next(group for group in channel_groups(original_spec()) if group.name == "up3.stream")
    pooled = group_covariance(group, COVARIANCES)
    louder = {**COVARIANCES, "up3.1": 1e6 * COVARIANCES["up3.1"]}
    torch.testing.assert_close(group_covariance(group, louder), pooled)
    assert float(pooled.trace()) == pytest.approx(len(group.tensors))


def test_random_sets_differ_between_groups_and_follow_the_seed() -> None:
    def chosen(seed: int) -> list[tuple[int, ...]]:
        _, report = select_channels(original_spec(), COVARIANCES, {"mid": 0.5}, rule="random", seed=seed)
        return [one.kept for one in report]

    assert len(set(chosen(0))) > 1
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


@given(
    width=st.integers(1, 400),
    keep_ratio=st.floats(0.0, 1.0, exclude_min=True),
    round_to=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_widths_are_rounded(width: int, keep_ratio: float, round_to: int) -> None:
    if round(width * keep_ratio) < 1:
        with pytest.raises(SpecError, match=f"keeps none of {width} channels"):
            num_kept_channels(width, keep_ratio, round_to)
        return
    kept = num_kept_channels(width, keep_ratio, round_to)
    assert 1 <= kept <= width
    assert kept == width or kept % round_to == 0
    assert kept in (width, round_to) or abs(kept - width * keep_ratio) <= round_to / 2 + 0.5


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratios_outside_their_range(keep_ratio: float) -> None:
    with pytest.raises(SpecError, match="above 0 and at most 1"):
        num_kept_channels(8, keep_ratio, 1)


def test_names_and_ratios_that_cannot_be_pruned() -> None:
    with pytest.raises(SpecError, match=r"no stage 'up9' to prune; this decoder has mid, up0, up1, up2, up3"):
        select_channels(original_spec(), COVARIANCES, {"up9": 0.5}, rule="greedy-r2")
    with pytest.raises(SpecError, match="no stage 'head'"):
        select_channels(original_spec(), COVARIANCES, {"head": 0.5}, rule="greedy-r2")
    with pytest.raises(SpecError, match=r"ratio 0\.05 keeps none of 8 channels; use at least 0\.125"):
        select_channels(original_spec(), COVARIANCES, {"up2": 0.05}, rule="greedy-r2")


def test_covariances_of_another_decoder() -> None:
    missing = {tensor: matrix for tensor, matrix in COVARIANCES.items() if tensor != "up2.1"}
    with pytest.raises(CalibrationError, match=r"up2\.1: the analysis holds none, the decoder has 8 channels"):
        select_channels(original_spec(), missing, {"up2": 0.5}, rule="greedy-r2")
    wider = {**COVARIANCES, "up2.1": torch.eye(9, dtype=torch.float64)}
    with pytest.raises(CalibrationError, match=r"up2\.1: the analysis holds 9 channels, .* run `flashvaed analyze`"):
        select_channels(original_spec(), wider, {"up2": 0.5}, rule="greedy-r2")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_dead_tensors(value: float) -> None:
    dead = {**COVARIANCES, "up2.1": torch.full((8, 8), value, dtype=torch.float64)}
    with pytest.raises(CalibrationError, match=r"up2\.1: no channel varies"):
        select_channels(original_spec(), dead, {"up2": 0.5}, rule="greedy-r2")
