from __future__ import annotations

import pytest
import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.distill.phases import (
    gradient_masks,
    plan_phase_1,
    plan_phase_2,
    plan_phase_3,
    swapped_stages,
    trained_parameters,
)
from flashvaed_cli.errors import DistillationError, SpecError
from flashvaed_cli.families.wan21.spec import WAN21
from tests.unit.distill.small_decoders import FULL_SPEC, converted_spec, pruned_spec

ORIGINAL = FULL_SPEC
SHALLOW = WAN21.shallow_stages


def test_phase_1_trains_the_converted_deep_stages_only() -> None:
    converted = converted_spec(ORIGINAL, dict(WAN21.paper_operators))
    assert swapped_stages(converted, ORIGINAL) == ("mid", "up0", "up1", "up2", "up3")
    plan = plan_phase_1(converted, ORIGINAL, shallow_stages=SHALLOW)
    assert plan.trained_stages == ("mid", "up0", "up1")
    assert [m.address for m in plan.matches] == [
        *(f"mid.{i}" for i in range(3)),
        *(f"up0.{i}" for i in range(4)),
        *(f"up1.{i}" for i in range(4)),
    ]
    names = trained_parameters(Decoder(converted), plan)
    assert {name.split(".")[1] for name in names} == {"mid", "up0", "up1"}


def test_phase_1_has_nothing_to_do_where_nothing_deep_was_converted() -> None:
    only_shallow = converted_spec(ORIGINAL, {"up3": "frame2d"})
    with pytest.raises(DistillationError, match="convert-ops first"):
        plan_phase_1(only_shallow, ORIGINAL, shallow_stages=SHALLOW)
    assert swapped_stages(pruned_spec(ORIGINAL, 1), ORIGINAL) == ()  # pruning is no conversion


def test_phase_2_masks_what_writes_to_channels_that_will_go() -> None:
    group = next(g for g in channel_groups(ORIGINAL) if g.name == "up3.stream")
    to_keep = dict.fromkeys(group.tensors, (1,)) | {"up3.1.conv1": (0,), "up2.3": (0, 1)}
    plan = plan_phase_2(ORIGINAL, ORIGINAL, to_keep=to_keep)
    masks = gradient_masks(Decoder(ORIGINAL), plan)
    assert set(masks) == {
        f"stages.{layer}.{kind}"
        for layer in ("up3.0.conv2", "up3.1.conv2", "up3.2.conv2", "up3.1.conv1", "up2.3.spatial")
        for kind in ("weight", "bias")
    }
    assert masks["stages.up3.0.conv2.weight"].flatten().tolist() == [0, 1]
    assert masks["stages.up3.1.conv1.bias"].tolist() == [1, 0]
    assert plan.trained_stages == tuple(stage.name for stage in ORIGINAL.stages)


def test_phase_2_refuses_a_pruned_decoder_and_an_empty_choice() -> None:
    with pytest.raises(DistillationError, match="prune after it"):
        plan_phase_2(pruned_spec(ORIGINAL, 1), ORIGINAL, to_keep={"up3.0": (0,)})
    with pytest.raises(DistillationError, match="give a ratio"):
        plan_phase_2(ORIGINAL, ORIGINAL, to_keep={})


def test_phase_3_prefers_projections_then_indices_and_names_what_it_cannot_match() -> None:
    narrow = pruned_spec(ORIGINAL, 1)
    blind = plan_phase_3(narrow, ORIGINAL)
    assert blind.unmatched == ("up3.0", "up3.1", "up3.2")
    plan = plan_phase_3(
        narrow,
        ORIGINAL,
        kept_channels={"up3.0": (1,), "up3.1": (1,), "up3.1.conv1": (0,)},
        projections={"up3.1": (torch.ones(2, 1), torch.zeros(2))},
    )
    how = {m.address: (m.kept, m.projection is not None) for m in plan.matches}
    assert how["up3.0"] == ((1,), False) and how["up3.1"] == (None, True) and how["up3.1.conv1"] == ((0,), False)
    assert how["mid.0"] == (None, False) and "head.0" not in how
    assert plan.unmatched == ("up3.2",)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"up3.0": (0, 1)}, "1 channels, but 2 are named"),
        ({"up3.0": (2,)}, "0..1"),
        ({"up3.0": (-1,)}, "0..1"),
        ({"up3.0": ()}, "0..1"),
    ],
)
def test_sets_that_do_not_fit_are_refused(kept: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        plan_phase_3(pruned_spec(ORIGINAL, 1), ORIGINAL, kept_channels=kept)


def test_projections_that_do_not_fit_are_refused() -> None:
    wrong = {"up3.0": (torch.ones(1, 2), torch.zeros(2))}
    with pytest.raises(DistillationError, match="projection from 1 to 2"):
        plan_phase_3(pruned_spec(ORIGINAL, 1), ORIGINAL, projections=wrong)


def test_unknown_addresses_and_other_families_are_refused() -> None:
    with pytest.raises(SpecError, match=r"up9\.0"):
        plan_phase_3(ORIGINAL, ORIGINAL, kept_channels={"up9.0": (0,)})
    shorter = ORIGINAL.model_copy(update={"stages": ORIGINAL.stages[:-2] + ORIGINAL.stages[-1:]})
    with pytest.raises(SpecError, match="same stages"):
        plan_phase_3(shorter, ORIGINAL)
