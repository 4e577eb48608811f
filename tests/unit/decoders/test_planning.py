"""The fastest plan that fits: more memory never makes it slower, and an error names the memory that would do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.errors import DecodeError, SpecError
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.toy import DECODER_SPECS

SPEC = DECODER_SPECS["flash"]
RELEASED = wan_decoder_spec(96)


@given(limits=st.tuples(st.integers(17, 40), st.integers(17, 40)).map(sorted))
@settings(max_examples=5)
def test_more_memory_is_never_slower(limits: list[int]) -> None:
    plans = []
    for limit in limits:
        try:
            plans.append(choose_plan(SPEC, (4, 12, 9), max_memory_bytes=limit * 10**6))
        except DecodeError:
            assert not plans  # less memory was enough
        else:
            assert plans[-1].predicted_bytes <= limit * 10**6
    if len(plans) == 2:
        assert plans[1].relative_cost <= plans[0].relative_cost


def test_whole_clips_where_there_is_room() -> None:
    plan = choose_plan(RELEASED, (5, 32, 32), max_memory_bytes=10**12)
    assert (plan.chunk, plan.tile, plan.split) == (5, None, None)
    assert plan == choose_plan(RELEASED, (5, 32, 32))


def test_high_definition_within_stated_limits() -> None:
    for limit in (16, 40):
        plan = choose_plan(RELEASED, (6, 135, 240), max_memory_bytes=limit * 10**9, dtype="bfloat16")
        assert plan.predicted_bytes <= limit * 10**9 and plan.relative_cost < 1.25


def test_the_plan_has_the_predicted_memory() -> None:
    plan = choose_plan(RELEASED, (21, 60, 104), max_memory_bytes=6 * 10**9, dtype="bfloat16")
    again = predict_peak_bytes(
        RELEASED, (21, 60, 104), chunk=plan.chunk, tile=plan.tile, split=plan.split, dtype="bfloat16"
    )
    assert plan.predicted_bytes == again


def test_what_is_settled_stays() -> None:
    limit = 24 * 10**9
    plan = choose_plan(RELEASED, (21, 135, 240), max_memory_bytes=limit, dtype="bfloat16", chunk=1)
    assert plan.chunk == 1
    plan = choose_plan(RELEASED, (21, 135, 240), max_memory_bytes=limit, dtype="bfloat16", tile=60)
    assert plan.tile == 60 and plan.split is not None
    plan = choose_plan(RELEASED, (21, 135, 240), chunk=3, tile=60)
    assert (plan.chunk, plan.tile) == (3, 60)


def test_an_impossible_limit_names_the_least_that_works() -> None:
    with pytest.raises(DecodeError, match=r"3 x 60 x 104 latents .* within 0.2 GB in bfloat16: the least is") as caught:
        choose_plan(RELEASED, (3, 60, 104), max_memory_bytes=2 * 10**8, dtype="bfloat16")
    least = float(str(caught.value).split("the least is ")[1].split(" GB")[0])
    plan = choose_plan(RELEASED, (3, 60, 104), max_memory_bytes=int(least * 1e9), dtype="bfloat16")
    assert plan.predicted_bytes <= least * 1e9


@pytest.mark.parametrize("settled", [{"chunk": 1}, {"chunk": 2}, {"tile": 30}, {"chunk": 1, "tile": 30}], ids=str)
def test_sizes_that_cost_memory_are_advised_against(settled: dict[str, int]) -> None:
    grid = (3, 60, 104)
    chunk, tile = settled.get("chunk"), settled.get("tile")
    with pytest.raises(DecodeError, match="or leave the sizes of chunks and tiles open") as caught:
        choose_plan(RELEASED, grid, max_memory_bytes=10**7, chunk=chunk, tile=tile)
    enough = int(float(str(caught.value).split("open (")[1].split(" GB")[0]) * 1e9)
    assert choose_plan(RELEASED, grid, max_memory_bytes=enough).predicted_bytes <= enough
    with pytest.raises(DecodeError):
        choose_plan(RELEASED, grid, max_memory_bytes=enough, chunk=chunk, tile=tile)


@pytest.mark.parametrize("settled", [{}, {"chunk": 3}], ids=str)
def test_where_no_other_sizes_take_less_memory_none_are_advised(settled: dict[str, int]) -> None:
    with pytest.raises(DecodeError) as caught:
        choose_plan(RELEASED, (3, 60, 104), max_memory_bytes=10**7, chunk=settled.get("chunk"))
    assert str(caught.value).endswith("or decode fewer or smaller frames")


def test_mistakes_are_named() -> None:
    with pytest.raises(SpecError, match="at least 1 latent frame, not 0"):
        choose_plan(SPEC, (3, 4, 4), chunk=0)
    with pytest.raises(SpecError, match="at least 1 latent wide, not 0"):
        choose_plan(SPEC, (3, 4, 4), tile=0)
