from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.errors import CalibrationError, SpecError
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.independence import r2_of_set
from flashvaed_cli.numerics.selection import SELECTION_RULES
from flashvaed_cli.surgery.evidence import pooled_evidence
from flashvaed_cli.surgery.selection import num_kept_channels, select_channels
from tests.toy import original_spec, toy_decoder
from tests.unit.surgery.random_statistics import random_statistics

DECODER = toy_decoder()
STATISTICS = random_statistics(original_spec())


def with_statistics(tensor: str, covariance: Tensor, mean: Tensor | None = None) -> dict[str, TensorStatistics]:
    """The statistics of the toy decoder with those of one tensor replaced."""
    mean = torch.zeros(len(covariance), dtype=torch.float64) if mean is None else mean
    return {**STATISTICS, tensor: TensorStatistics(covariance, mean, 100)}


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_group_of_the_named_stages_keeps_its_share(rule: str) -> None:
    spec = original_spec()
    kept, report = select_channels(DECODER, STATISTICS, {"up2": 0.5, "up3": 0.25, "mid": 0.75}, rule=rule)
    groups = {group.name: group for group in channel_groups(spec) if group.stage in ("up2", "up3", "mid")}
    assert [one.group for one in report] == list(groups)
    assert set(kept) == {tensor for group in groups.values() for tensor in group.tensors}
    for one in report:
        group = groups[one.group]
        ratio = {"up2": 0.5, "up3": 0.25, "mid": 0.75}[group.stage]
        assert len(one.kept) == round(group.width * ratio) and one.width == group.width
        assert list(one.kept) == sorted(set(one.kept)) and one.kept[0] >= 0 and one.kept[-1] < group.width
        assert {kept[tensor] for tensor in group.tensors} == {one.kept}
        assert one.r2 == pytest.approx(r2_of_set(pooled_evidence(group, STATISTICS).covariance, one.kept))
        assert 0.0 < one.r2 <= 1.0


def test_keeping_all_prunes_nothing() -> None:
    assert select_channels(DECODER, STATISTICS, {"up2": 1.0}, rule="greedy-r2") == ({}, [])


def test_a_groups_ratio_wins_over_its_stages() -> None:
    ratios = {"up3": 0.5, "up3.stream": 0.25, "up3.0.inner": 1.0, "up2.1.inner": 0.75}
    kept, report = select_channels(DECODER, STATISTICS, ratios, rule="next-layer")
    assert {one.group: len(one.kept) for one in report} == {
        "up2.1.inner": 6, "up3.stream": 1, "up3.1.inner": 2, "up3.2.inner": 2
    }  # fmt: skip
    assert "up3.0.conv1" not in kept


def test_random_sets_differ_between_groups_and_follow_the_seed() -> None:
    def chosen(seed: int) -> list[tuple[int, ...]]:
        _, report = select_channels(DECODER, STATISTICS, {"mid": 0.5}, rule="random", seed=seed)
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
        select_channels(DECODER, STATISTICS, {"up9": 0.5}, rule="greedy-r2")
    with pytest.raises(SpecError, match="no stage 'head'"):
        select_channels(DECODER, STATISTICS, {"head": 0.5}, rule="greedy-r2")
    with pytest.raises(SpecError, match=r"ratio 0\.05 keeps none of 8 channels; use at least 0\.125"):
        select_channels(DECODER, STATISTICS, {"up2": 0.05}, rule="greedy-r2")


def test_unknown_groups_are_listed() -> None:
    with pytest.raises(SpecError, match=r"no channel group 'up3\.strem' to prune; this decoder has .*up3\.stream, "):
        select_channels(DECODER, STATISTICS, {"up3.strem": 0.5}, rule="greedy-r2")


def test_statistics_of_another_decoder() -> None:
    missing = {tensor: one for tensor, one in STATISTICS.items() if tensor != "up2.1"}
    with pytest.raises(CalibrationError, match=r"up2\.1: the analysis holds none, the decoder has 8 channels"):
        select_channels(DECODER, missing, {"up2": 0.5}, rule="greedy-r2")
    wider = with_statistics("up2.1", torch.eye(9, dtype=torch.float64))
    with pytest.raises(CalibrationError, match=r"up2\.1: the analysis holds 9 channels, .* run `flashvaed analyze`"):
        select_channels(DECODER, wider, {"up2": 0.5}, rule="greedy-r2")


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_tensors_that_are_dead_or_not_finite_are_named(rule: str) -> None:
    eye = torch.eye(8, dtype=torch.float64)
    for covariance, mean, message in (
        (0.0 * eye, eye[0], r"up2\.1: no channel varies"),
        (eye * float("nan"), eye[0], r"up2\.1: its statistics hold NaN"),
        (eye, eye[0] * float("nan"), r"up2\.1: its statistics hold NaN"),
    ):
        with pytest.raises(CalibrationError, match=message):
            select_channels(DECODER, with_statistics("up2.1", covariance, mean), {"up2": 0.5}, rule=rule)


@pytest.mark.parametrize("rule", [rule for rule in SELECTION_RULES if rule != "greedy-energy"])
def test_channels_that_do_not_vary_go_first_and_are_reported(rule: str) -> None:
    covariance = torch.eye(8, dtype=torch.float64)
    covariance[[1, 4], [1, 4]] = 0.0
    mean = torch.zeros(8, dtype=torch.float64)
    mean[4] = 2.0
    statistics = with_statistics("up2.1.conv1", covariance, mean)
    _, report = select_channels(DECODER, statistics, {"up2": 0.75}, rule=rule)
    selections = {one.group: one for one in report}
    inner = selections["up2.1.inner"]
    assert (inner.kept, inner.dead, inner.constant) == ((0, 2, 3, 5, 6, 7), (1,), (4,))
    assert inner.r2 == 1.0
    stream = selections["up2.stream"]
    assert (stream.dead, stream.constant) == ((), ())
