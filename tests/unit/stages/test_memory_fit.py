"""Steps and limits that a machine's memory asks for."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.decoders.predict.lookahead import usual_chunk
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.decoders.run import runtime
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.stages.common import memory_fit
from flashvaed_cli.stages.common.memory_fit import Limits, fit_to_memory, streaming_limits
from tests.ltx_toy import flash_ltx_spec
from tests.toy import original_spec

CPU = torch.device("cpu")


def limits_of(spec: DecoderSpec, num_latents: int, asked: Limits | None = None) -> Limits:
    return streaming_limits(spec, (num_latents, 4, 4), asked or Limits(), torch.float32, CPU)


def test_a_clip_is_decoded_once_and_not_once_for_every_chunk() -> None:
    """A decoder that sees frames ahead reads its halo with each: in chunks of 4, LTX took a clip of 16 four times."""
    centred = flash_ltx_spec()
    assert limits_of(original_spec(), 16) == Limits(chunk=4)
    assert limits_of(centred, 16) == Limits(chunk=usual_chunk(centred))
    assert choose_plan(centred, (16, 4, 4), chunk=usual_chunk(centred)).relative_cost < 1.1
    assert choose_plan(centred, (16, 4, 4), chunk=4).relative_cost > 3
    assert choose_plan(centred, (400, 4, 4), chunk=usual_chunk(centred)).relative_cost < 2.1
    assert limits_of(centred, 16, Limits(chunk=4)) == Limits(chunk=4)


def test_what_does_not_fit_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_fit, "free_bytes", lambda _: 10**6)
    limits = limits_of(flash_ltx_spec(), 16)
    assert limits.chunk is None and limits.max_memory_bytes == 900_000


def test_formats_without_kernels_count_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runtime counts them: what fits here must not be refused there."""
    spec, latents = original_spec(), torch.empty(1, 4, 5, 24, 24, dtype=torch.float16)
    needed = {}
    for has_kernels in (True, False):
        monkeypatch.setattr(runtime, "has_kernels", lambda *_, answer=has_kernels: answer)
        needed[has_kernels] = runtime.plan_on(CPU, spec, (5, 24, 24), torch.float16).predicted_bytes
    between = Limits(max_memory_bytes=sum(needed.values()) // 2)
    plan = runtime.plan_on(CPU, spec, (5, 24, 24), torch.float16, **vars(between))
    assert needed[False] > needed[True] and plan.chunk < 5
    assert f"chunk {plan.chunk}" in fit_to_memory(spec, latents, between).remark
