"""`DecodeRuntime.open`: frames as latents come, for causal decoders and for those that see frames ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.lookahead import time_halo, usual_chunk
from flashvaed_cli.decoders.run.buffers import WindowBuffer
from flashvaed_cli.decoders.run.overflow import explain_overflow, first_overflow
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import DecodeError, NonFiniteError, SpecError
from tests.hunyuan15_toy import hunyuan15_spec
from tests.ltx_toy import flash_ltx_spec, ltx_decoder
from tests.toy import toy_decoder, toy_latents


@pytest.fixture(scope="module")
def centred() -> Decoder:
    return ltx_decoder(flash_ltx_spec()).double()


def streamed(runtime: DecodeRuntime, latents: Tensor, part: int) -> list[Tensor]:
    stream = runtime.open(*latents.shape[3:], batch=latents.shape[0])
    return [*(stream.step(piece) for piece in latents.split(part, dim=2)), stream.flush()]


@pytest.mark.parametrize(("part", "chunk"), [(1, 1), (3, 2), (40, None)])
def test_a_decoder_that_sees_ahead_gives_the_whole_clips_frames(centred: Decoder, part: int, chunk: int | None) -> None:
    ahead = time_halo(centred.spec)[1]
    latents = torch.randn(1, centred.spec.latent_width, ahead + 3, 2, 2, dtype=torch.float64)
    frames = streamed(DecodeRuntime(centred, DecodeSettings(chunk=chunk)), latents, part)
    torch.testing.assert_close(torch.cat(frames, dim=2), decode(centred, latents), rtol=0, atol=1e-9)
    if part == 1:
        assert frames[0].shape[2] == 0 and frames[-2].shape[2] > 0  # no frame comes before it is settled


@pytest.mark.parametrize("chunk", [None, 4])
def test_small_parts_share_a_step(centred: Decoder, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step reads the halo too: a step for every part would decode the clip as often as there are parts."""
    halo = sum(time_halo(centred.spec))
    assert usual_chunk(centred.spec) == halo and usual_chunk(toy_decoder().spec) == 4
    num_latents = halo + halo % 2 + 4
    latents = torch.randn(1, centred.spec.latent_width, num_latents, 1, 1, dtype=torch.float64)
    runtime = DecodeRuntime(centred, DecodeSettings(chunk=chunk))
    steps: list[int] = []
    run = Decoder.run

    def counted(decoder: Decoder, x: Tensor, *more: object, **named: object) -> Tensor:
        steps.append(x.shape[2])
        return run(decoder, x, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "run", counted)
    frames = list(runtime.iter_parts(latents.split(2, dim=2), num_latents=num_latents))
    assert len(steps) == (2 if chunk is None else -(-num_latents // chunk)) and max(steps) <= 2 * halo + 1
    assert [part.shape[2] for part in frames] == [9, *[16] * (num_latents // 2 - 1)]
    monkeypatch.undo()
    torch.testing.assert_close(torch.cat(frames, dim=2), decode(centred, latents), rtol=0, atol=1e-9)


def test_a_short_clip_comes_with_the_flush(centred: Decoder) -> None:
    latents = torch.randn(2, centred.spec.latent_width, 4, 2, 3, dtype=torch.float64)
    *steps, rest = streamed(DecodeRuntime(centred, DecodeSettings()), latents, 1)
    assert [step.shape[2] for step in steps] == [0] * 4
    torch.testing.assert_close(rest, decode(centred, latents), rtol=0, atol=1e-9)


def test_a_causal_decoder_gives_all_at_once_and_nothing_at_the_end() -> None:
    decoder = toy_decoder().double()
    latents = toy_latents(4).double()
    *steps, rest = streamed(DecodeRuntime(decoder, DecodeSettings()), latents, 1)
    assert [step.shape[2] for step in steps] == [1, 4, 4, 4] and rest.shape[2] == 0
    torch.testing.assert_close(torch.cat(steps, dim=2), decode(decoder, latents), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 4, 1, 2, 3), (1, 5, 1, 2, 3), (1, 4, 1, 3, 2), (1, 4, 0, 2, 3)])
def test_other_latents_than_it_was_opened_for_are_refused(shape: tuple[int, ...]) -> None:
    stream = DecodeRuntime(toy_decoder(), DecodeSettings()).open(2, 3)
    with pytest.raises(SpecError, match=r"opened for latents \[1, 4, T, 2, 3\], got"):
        stream.step(torch.zeros(shape))


def growing() -> Decoder:
    """HunyuanVideo 1.5: the state of its attention grows with the clip."""
    return toy_decoder(hunyuan15_spec())


@pytest.mark.parametrize("make", [growing, toy_decoder])
def test_a_clip_of_known_length_is_planned_as_the_whole_is(make: Callable[[], Decoder]) -> None:
    """Not as a long one would be, for which nothing fits, or only smaller steps."""
    decoder, latents = make(), toy_latents(2, 48, 48)
    limit = DecodeRuntime(decoder, DecodeSettings()).plan(latents).predicted_bytes
    runtime = DecodeRuntime(decoder, DecodeSettings(max_memory_bytes=limit))
    assert runtime.open(48, 48, num_latents=2).plan == runtime.plan(latents)
    assert runtime.plan(latents).chunk == 2 and runtime.plan(latents).tile is None
    (frames,) = runtime.iter_parts([latents], num_latents=2)
    torch.testing.assert_close(frames, decode(decoder, latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [growing, toy_decoder])
def test_a_stream_of_known_length_keeps_nothing_at_the_end(make: Callable[[], Decoder]) -> None:
    decoder, latents = make(), toy_latents(4)
    stream = DecodeRuntime(decoder, DecodeSettings(chunk=1)).open(2, 3, num_latents=4)
    frames = [stream.step(latents[:, :, :1]), stream.step(latents[:, :, 1:])]
    torch.testing.assert_close(torch.cat(frames, dim=2), decode(decoder, latents), rtol=0, atol=1e-5)
    with pytest.raises(SpecError, match="opened for 0 more latents, got 1"):
        stream.step(latents[:, :, :1])


@pytest.mark.unchecked
@torch.no_grad()
def test_a_compiled_clip_in_one_part_has_no_state_that_grows() -> None:
    decoder, latents = growing(), toy_latents(2)
    runtime = DecodeRuntime(decoder, DecodeSettings(compile=True, compile_backend="eager"))
    (frames,) = runtime.iter_parts([latents], num_latents=2)
    torch.testing.assert_close(frames, decode(decoder, latents), rtol=0, atol=1e-5)
    with pytest.raises(DecodeError, match="state of this decoder grows"):
        list(runtime.iter_parts(latents.split(1, dim=2), num_latents=2))


def test_a_flushed_stream_is_at_its_end() -> None:
    stream = DecodeRuntime(toy_decoder(), DecodeSettings()).open(2, 3)
    stream.step(toy_latents(1))
    stream.flush()
    with pytest.raises(SpecError, match="was flushed"):
        stream.step(toy_latents(1))


def test_held_latents_do_not_grow_with_the_video(centred: Decoder) -> None:
    buffer = WindowBuffer(centred.spec)
    before, ahead = time_halo(centred.spec)
    longest = 0
    for _ in range(4 * (before + ahead)):
        for latents, _window in buffer.push(torch.zeros(1, 1, 2, 1, 1)):
            longest = max(longest, latents.shape[2])
    assert longest <= before + 2 + ahead and buffer.held.num_held <= before + 4 + ahead


def test_a_caller_may_write_into_its_tensor_again(centred: Decoder) -> None:
    latents = torch.randn(1, centred.spec.latent_width, 3, 2, 2, dtype=torch.float64)
    stream, part = DecodeRuntime(centred, DecodeSettings()).open(2, 2), torch.empty_like(latents[:, :, :1])
    for index in range(3):
        stream.step(part.copy_(latents[:, :, index : index + 1]))
    torch.testing.assert_close(stream.flush(), decode(centred, latents), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 1])
def test_frames_that_are_not_finite_name_the_layer(chunk: int | None) -> None:
    decoder = toy_decoder()
    with torch.no_grad():
        decoder.at("up1.1.conv2").weight.fill_(3e38)  # type: ignore[union-attr]
    runtime = DecodeRuntime(decoder, DecodeSettings(chunk=chunk))
    with pytest.raises(NonFiniteError, match=r"up1\.1\.conv2 overflows float32\. The weights are damaged"):
        runtime.decode(toy_latents(2))


def test_no_memory_to_look_for_the_layer_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that overflowed may have had tiles; the search has none."""

    def none_left(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder = toy_decoder()
    monkeypatch.setattr("flashvaed_cli.decoders.run.overflow.first_overflow", none_left)
    told = explain_overflow(decoder.half(), toy_latents(1).half())
    assert told.startswith("the frames hold NaN or infinite values: a layer overflows float16. Decode with --dtype bfl")


def test_half_precision_gets_other_advice() -> None:
    """For a decoder that is in float16 already, which can no longer be scaled."""
    decoder = toy_decoder()
    with torch.no_grad():
        decoder.at("up0.0.conv2").weight.mul_(2e5)  # type: ignore[union-attr]
    runtime = DecodeRuntime(decoder.half(), DecodeSettings())
    with pytest.raises(NonFiniteError, match=r"overflows float16\. Decode with --dtype bfloat16 or float32"):
        runtime.decode(toy_latents(2))


@pytest.mark.parametrize(("value", "found"), [(torch.nan, "NaN"), (-torch.inf, "NaN or inf"), (1e20, r"up to 1e\+20")])
def test_latents_that_no_decoder_can_take_are_named_as_such(value: float, found: str) -> None:
    latents = toy_latents(2)
    latents[0, 0, 1] = value
    with pytest.raises(NonFiniteError, match=f"the latents hold .*{found}"):
        DecodeRuntime(toy_decoder(), DecodeSettings()).decode(latents)
    assert first_overflow(toy_decoder(), toy_latents(2)) is None
