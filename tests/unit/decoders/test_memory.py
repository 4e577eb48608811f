"""The prediction bounds what a process really takes, and grows with what it should grow with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvaed_cli.decoders.exact import exact_spec
from flashvaed_cli.decoders.memory import predict_peak_bytes
from flashvaed_cli.decoders.wan import wan_decoder_spec
from flashvaed_cli.errors import SpecError

SPEC = wan_decoder_spec(16)


@given(chunk=st.integers(1, 8), height=st.integers(2, 60), width=st.integers(2, 60))
def test_more_pixels_and_frames_need_more(chunk: int, height: int, width: int) -> None:
    small = predict_peak_bytes(SPEC, (20, height, width), chunk=chunk, dtype="bfloat16")
    assert predict_peak_bytes(SPEC, (20, height + 1, width), chunk=chunk, dtype="bfloat16") > small
    assert predict_peak_bytes(SPEC, (20, height, width), chunk=chunk + 1, dtype="bfloat16") > small
    assert predict_peak_bytes(SPEC, (20, height, width), chunk=chunk, dtype="bfloat16", batch=2) > small


def test_a_chunked_decode_stays_flat_with_the_number_of_frames() -> None:
    assert predict_peak_bytes(SPEC, (21, 60, 104), chunk=4) == predict_peak_bytes(SPEC, (2001, 60, 104), chunk=4)


def test_tiles_and_half_precision_need_less() -> None:
    whole = predict_peak_bytes(SPEC, (21, 135, 240), chunk=2)
    assert predict_peak_bytes(SPEC, (21, 135, 240), chunk=2, tile=60) < 0.75 * whole
    assert predict_peak_bytes(SPEC, (21, 135, 240), chunk=2, dtype="bfloat16") < 0.6 * whole
    assert predict_peak_bytes(exact_spec(SPEC), (21, 135, 240), chunk=2) < whole


def test_without_a_split_the_best_one_counts() -> None:
    best = predict_peak_bytes(SPEC, (21, 135, 240), chunk=1, tile=40)
    assert best <= predict_peak_bytes(SPEC, (21, 135, 240), chunk=1, tile=40, split="up3.0")
    with pytest.raises(SpecError, match=r"no block 'nowhere\.0'"):
        predict_peak_bytes(SPEC, (21, 135, 240), tile=40, split="nowhere.0")


MEASURED = """
import sys
from pathlib import Path
import torch
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.exact import exact_spec
from flashvaed_cli.decoders.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.wan import wan_decoder_spec
from flashvaed_cli.decoders.wan22 import wan22_decoder_spec

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

torch.set_num_threads(1)
chunk, tile = (None if text == "-" else int(text) for text in sys.argv[1:3])
build = {"wan2.1": wan_decoder_spec, "wan2.2": wan22_decoder_spec}[sys.argv[3]]
decoder = Decoder(exact_spec(build(8, 16))).requires_grad_(False)
runtime = DecodeRuntime(decoder, DecodeSettings(chunk=chunk, tile=tile))
latents = torch.randn(1, 16, 2, 24, 32)
runtime.decode(latents[:, :, :2, :2, :2])
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
for frames in runtime.iter_decode(latents):
    pass
print(1024 * (kilobytes("VmHWM") - before), runtime.plan(latents).predicted_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("chunk", "tile", "family"), [("-", "-", "wan2.1"), ("1", "16", "wan2.1"), ("-", "-", "wan2.2")]
)
def test_a_process_stays_below_the_prediction(chunk: str, tile: str, family: str) -> None:
    """Tensors are mapped one by one, so that freed memory goes back and the peak is that of what lives."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, chunk, tile, family],
        capture_output=True, text=True, check=False, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured, predicted = map(int, done.stdout.split())
    assert 0.4 * predicted < measured <= 1.1 * predicted  # a tenth for the interpreter and the kernels' own
