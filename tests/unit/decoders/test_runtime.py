"""Every setting gives the plain decoder's frames.

Float64 where a fault of chunks or tiles cannot hide behind rounding; float32 for the promised 1e-5.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.predict.lookahead import chunk_spans
from flashvaed_cli.decoders.run import runtime as runtime_module
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.variants.exact import exact_spec
from flashvaed_cli.errors import DecodeError, SpecError
from tests.toy import DECODER_SPECS, toy_decoder, toy_latents

EXACT = 1e-9  # winograd's transforms lose a digit of float64
TILE_BOUND = 1e-5
SPECS = {**DECODER_SPECS, **{f"exact {name}": exact_spec(spec) for name, spec in DECODER_SPECS.items()}}
PRECISE = {name: toy_decoder(spec).double() for name, spec in SPECS.items()}
PLAIN = {name: toy_decoder(spec).double() for name, spec in DECODER_SPECS.items()}


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@given(
    name=st.sampled_from(list(SPECS)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9)),
    chunk=st.none() | st.integers(1, 5),
    tile=st.none() | st.integers(1, 10),
    memory_format=st.sampled_from(["contiguous", "channels-last"]),
)
@settings(max_examples=20)
def test_tiles_and_chunks_give_the_whole_clips_frames(name, size, chunk, tile, memory_format) -> None:
    latents = toy_latents(*size).double()
    runtime = DecodeRuntime(PRECISE[name], DecodeSettings(chunk=chunk, tile=tile, memory_format=memory_format))
    assert_close(runtime.decode(latents), decode(PLAIN[name.removeprefix("exact ")], latents), EXACT)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_every_layer_keeps_channels_innermost(chunk: int | None) -> None:
    """Also for a step of one frame: torch loses the layout if a side of length 1 has an odd stride."""
    runtime = DecodeRuntime(toy_decoder(SPECS["exact low-rank"]), DecodeSettings(chunk=chunk))
    _, blocks = zip(*runtime._decoder.blocks(), strict=True)
    lost: list[object] = []

    def look(module: torch.nn.Module, _: object, y: Tensor) -> None:
        if y.stride(1) != 1:
            lost.append(module.address)

    for module in (m for block in blocks for m in block.modules() if isinstance(m, Conv)):
        module.register_forward_hook(look)
    runtime.decode(toy_latents(3, 6, 8))
    assert not lost


def test_a_stream_gives_the_whole_clips_frames() -> None:
    latents = toy_latents(5, 6, 7).double()
    for settings_ in (DecodeSettings(), DecodeSettings(chunk=1, tile=3), DecodeSettings(max_memory_bytes=10**8)):
        stream = DecodeRuntime(PRECISE["exact flash"], settings_).open(6, 7)
        frames = [stream.step(latents[:, :, start:stop]) for start, stop in ((0, 2), (2, 3), (3, 5))]
        assert_close(torch.cat(frames, dim=2), decode(PLAIN["flash"], latents), EXACT)


@pytest.mark.parametrize("name", DECODER_SPECS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_float32_tiles_agree_with_whole_frames_to_five_digits(name: str, chunk: int | None) -> None:
    decoder, latents = toy_decoder(DECODER_SPECS[name]), toy_latents(4, 7, 6)
    whole = DecodeRuntime(decoder, DecodeSettings(chunk=chunk))
    tiled = DecodeRuntime(decoder, DecodeSettings(chunk=chunk, tile=3))
    assert tiled.plan(latents).split is not None
    assert_close(tiled.decode(latents), whole.decode(latents), TILE_BOUND)


@given(num_latents=st.integers(1, 50), chunk=st.integers(1, 60))
def test_only_the_first_step_is_shorter(num_latents: int, chunk: int) -> None:
    spans = list(chunk_spans(num_latents, chunk))
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == num_latents
    steps = [stop - start for start, stop in spans]
    assert 1 <= steps[0] <= chunk
    assert all(step == chunk for step in steps[1:])


def test_frames_stream_out() -> None:
    """Frames come before the later latents are even read."""
    decoder, latents = PLAIN["flash"], toy_latents(3, 1, 2).double()
    expected = decode(decoder, latents)
    stream = DecodeRuntime(decoder, DecodeSettings(chunk=1)).iter_decode(latents)
    first = next(stream)
    assert first.shape[2] == 1
    latents[:, :, 1:] = 0
    assert_close(first, expected[:, :, :1], EXACT)
    assert [frames.shape[2] for frames in stream] == [4, 4]


def test_runs_may_be_interleaved() -> None:
    runtime = DecodeRuntime(PLAIN["original"], DecodeSettings(chunk=1, tile=3))
    clips = [toy_latents(2, 5, 6, seed=seed).double() for seed in (1, 2)]
    pairs = list(zip(*(runtime.iter_decode(clip) for clip in clips), strict=True))
    for i, clip in enumerate(clips):
        assert_close(torch.cat([pair[i] for pair in pairs], dim=2), decode(PLAIN["original"], clip), EXACT)


def test_the_decoder_is_not_changed() -> None:
    decoder = toy_decoder()
    before = {name: (p.dtype, p.stride(), p.clone()) for name, p in decoder.named_parameters()}
    frames = DecodeRuntime(decoder, DecodeSettings(dtype=torch.bfloat16, chunk=1)).decode(toy_latents(2, 1, 2))
    assert frames.dtype == torch.bfloat16
    for name, parameter in decoder.named_parameters():
        dtype, stride, values = before[name]
        assert parameter.dtype == dtype and parameter.stride() == stride and torch.equal(parameter, values)


def test_half_precision_is_near() -> None:
    decoder, latents = toy_decoder(), toy_latents(2, 2, 3)
    frames = DecodeRuntime(decoder, DecodeSettings(dtype=torch.bfloat16)).decode(latents)
    assert (frames.float() - decode(decoder, latents)).abs().mean() < 0.02  # bfloat16 has eight bits


def test_a_batch_in_tiles() -> None:
    clips = torch.cat([toy_latents(2, 5, 6, seed=seed) for seed in (1, 2)]).double()
    found = DecodeRuntime(PRECISE["exact flash"], DecodeSettings(chunk=1, tile=3)).decode(clips)
    assert_close(found, decode(PLAIN["flash"], clips), EXACT)


def test_frames_are_clamped() -> None:
    decoder = toy_decoder()
    decoder.get_parameter("stages.head.0.conv.weight").mul_(100)
    for tile in (None, 2):
        frames = DecodeRuntime(decoder, DecodeSettings(tile=tile)).decode(toy_latents(2, 4, 4))
        assert float(frames.min()) == -1.0 and float(frames.max()) == 1.0


def test_a_limit_picks_chunk_and_tile() -> None:
    decoder, latents = PLAIN["original"], toy_latents(4, 12, 12).double()
    free = DecodeRuntime(decoder, DecodeSettings()).plan(latents)
    limited = DecodeRuntime(decoder, DecodeSettings(max_memory_bytes=free.predicted_bytes * 2 // 3))
    plan = limited.plan(latents)
    assert plan.predicted_bytes <= free.predicted_bytes * 2 // 3
    assert (plan.chunk, plan.tile) != (free.chunk, free.tile)
    assert_close(limited.decode(latents), decode(decoder, latents), EXACT)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = toy_decoder()
    with pytest.raises(SpecError, match=r"takes latents \[B, 4, T, H, W\]"):
        DecodeRuntime(decoder, DecodeSettings()).decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(SpecError, match="at least 1 latent frame, not 0"):
        DecodeRuntime(decoder, DecodeSettings(chunk=0)).decode(toy_latents())
    with pytest.raises(SpecError, match="at least 1 latent wide, not 0"):
        DecodeRuntime(decoder, DecodeSettings(tile=0)).decode(toy_latents())
    with pytest.raises(SpecError, match="at least 1 byte, not -1"):
        DecodeRuntime(decoder, DecodeSettings(max_memory_bytes=-1)).decode(toy_latents())
    with pytest.raises(DecodeError, match=r"do not decode within 0.001 GB in float32: the least is 0\.\d+ GB"):
        DecodeRuntime(decoder, DecodeSettings(max_memory_bytes=10**6)).decode(toy_latents())
    monkeypatch.setattr(runtime_module.shutil, "which", lambda _: None)
    with pytest.raises(DecodeError, match=r"needs a C\+\+ compiler"):
        DecodeRuntime(decoder, DecodeSettings(compile=True))


COMPILED = """
import sys
import torch
from torch._dynamo.utils import counters
from flashvaed_cli.decoders.variants.exact import exact_spec
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from tests.toy import WAN22_SPECS, flash_spec, toy_decoder, toy_latents

torch.set_num_threads(1)
latents = toy_latents(5, 4, 5).double()
spec = {"wan2.1": flash_spec(), "wan2.2": WAN22_SPECS["flash"]}[sys.argv[1]]
decoder = toy_decoder(exact_spec(spec)).double()
expected = decode(toy_decoder(spec).double(), latents)
for tile, num_graphs in ((3, 4),):
    counters.clear()
    settings = DecodeSettings(chunk=2, tile=tile, compile=True, compile_backend="eager")
    runtime = DecodeRuntime(decoder, settings)
    runtime.decode(latents)
    assert counters["stats"]["unique_graphs"] == num_graphs, counters
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert (runtime.decode(latents) - expected).abs().max() < 1e-9
    assert counters["stats"]["unique_graphs"] == num_graphs, counters
    assert not counters["graph_break"] and not counters["recompile_limit"], counters
"""


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_compiled_steps_are_static_and_never_compile_again(family: str) -> None:
    """In a process of its own, because the tests' shape checks cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", COMPILED, family],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
