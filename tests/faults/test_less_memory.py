"""Where decoding runs out of memory, chunks and then tiles get smaller; the frames are those of the smaller ones."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashvaed_cli
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.lookahead import time_halo
from flashvaed_cli.decoders.run.less_memory import smaller_steps
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe import DecodeRecipe
from flashvaed_cli.stages.decode.run import run_decode
from tests.commands import JUDGING, invoke, read_report, succeed
from tests.conftest import REPOSITORY
from tests.ltx_toy import flash_ltx_spec
from tests.toy import original_spec, write_toy_clip, write_toy_vae

ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
}
DECODE = "decode latents.safetensors -d vae.safetensors --format npy"
EVAL = f"eval vae.safetensors --data clip.mp4 --num-frames 9 {JUDGING} --no-video"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    save_file({"latents": torch.randn(1, 16, 5, 4, 16)}, folder / "latents.safetensors")
    return folder


@contextmanager
def memory_for(latents: int, *, tiles_only: bool = False, kind: str = "cuda") -> Iterator[list[int]]:
    """Decoders run out of memory with more latents in a step, or with whole frames; yields the steps that did."""
    usual, refused = Decoder.run, []

    def run(self: Decoder, x: Tensor, past: Any, future: Any, **blocks: Any) -> Tensor:
        is_whole = blocks.get("start") is None and blocks.get("stop") is None
        if x.shape[2] > latents or (tiles_only and is_whole):
            refused.append(x.shape[2])
            raise ERRORS[kind]()
        return usual(self, x, past, future, **blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", run)
        yield refused


def frames(folder: Path, words: str) -> np.ndarray:
    succeed(f"{DECODE} {words} --force -o out.npy", cwd=folder)
    return np.load(folder / "out.npy")


@pytest.mark.parametrize("kind", ERRORS)
def test_chunks_get_smaller(kind: str, folder: Path) -> None:
    with memory_for(2, kind=kind) as refused:
        document = succeed(f"{DECODE} --force -o less.npy", cwd=folder)
    assert refused == [4]  # the first step, of one latent, had gone into the file before
    told = " ".join(document["stderr"].split())
    assert told.count("out of memory: decoding latents.safetensors again with chunk 2") == 1
    assert (document["videos"][0]["chunk"], document["videos"][0]["num_frames"]) == (2, 17)
    assert "out of memory: latents.safetensors was decoded with chunk 2" in document["notes"]
    assert np.array_equal(np.load(folder / "less.npy"), frames(folder, "--chunk 2"))


def test_then_tiles_do(folder: Path) -> None:
    with memory_for(9, tiles_only=True) as refused:
        document = succeed(f"{DECODE} --chunk 2 --force -o less.npy", cwd=folder)
    assert refused == [1, 1]
    told = " ".join(document["stderr"].split())
    assert "again with chunk 1 " in f"{told} " and "again with chunk 1, tile 8" in told
    assert np.array_equal(np.load(folder / "less.npy"), frames(folder, "--chunk 1 --tile 8"))


def test_nothing_is_sent_twice(folder: Path) -> None:
    """Standard output has had the first step when memory runs out."""
    recipe = DecodeRecipe(
        latents=(str(folder / "latents.safetensors"),),
        decoder=str(folder / "vae.safetensors"),
        output="-",
        device="cpu",
    )

    def sent(recipe: DecodeRecipe) -> bytes:
        stream = io.BytesIO()
        run_decode(recipe, progress=SilentProgress(), force=False, command_line="", stdout=stream)
        return stream.getvalue()

    whole = sent(recipe.model_copy(update={"chunk": 2}))
    with memory_for(2) as refused:
        assert sent(recipe) == whole
    assert refused == [4]
    assert len(whole) == 17 * 3 * 32 * 128


LIMITED = """
import resource, sys
from pathlib import Path
import flashvaed_cli.stages.decode.run
from flashvaed_cli.cli.app import main

size = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 150_000_000, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by what /proc says")
def test_a_real_limit(tmp_path: Path) -> None:
    """Whether it fits in the end depends on the machine; that it steps down and never crashes does not."""
    save_file({"latents": torch.randn(1, 16, 13, 32, 48)}, tmp_path / "long.safetensors")
    words = "decode long.safetensors -d builtin:tiny-wan --latent-scale raw --chunk 13 -o long.npy -q --device cpu"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, *words.split()]
    run = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = " ".join(run.stderr.split())
    assert "out of memory: decoding long.safetensors again with chunk 4" in told, told
    assert (run.returncode, told.count("Error: out of memory: this machine is full")) in ((0, 0), (2, 1)), told
    assert "Traceback" not in told
    assert (tmp_path / "long.npy").exists() == (run.returncode == 0)


def test_where_nothing_gets_smaller_it_fails_cleanly(folder: Path) -> None:
    with memory_for(0) as refused:
        result = invoke(f"{DECODE} -o none.npy --quiet", cwd=folder)
    assert result.exit_code == 2
    assert refused == [1, 1, 1, 1]  # chunks of 4 and 2 begin with what is left over: one latent
    told = " ".join(result.stderr.split())
    assert told.count("Error: out of memory: the GPU is full. Give --max-memory, --tile, --chunk") == 1
    assert "Traceback" not in told
    assert not list(folder.glob("*none*"))


def test_other_errors_are_not_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_words: object, **_settings: object) -> Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Decoder, "run", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        invoke(f"{DECODE} -o none.npy --quiet", cwd=folder)


def test_eval(folder: Path) -> None:
    succeed(f"{EVAL} --chunk 1 -o usual", cwd=folder)
    with memory_for(1) as refused:
        document = succeed(f"{EVAL} -o less", cwd=folder)
    assert refused == [2, 2]
    assert "out of memory: decoded with chunk 2" in document["notes"]
    assert "out of memory: decoded with chunk 1" in document["notes"]
    figures = [read_report(folder / name)["clips"] for name in ("usual", "less")]
    assert figures[0] == figures[1]


def test_eval_of_more_than_fits_fails_cleanly(folder: Path) -> None:
    with memory_for(0):
        result = invoke(f"{EVAL} -o none --quiet", cwd=folder)
    assert result.exit_code == 2
    assert "Error: out of memory: the GPU is full" in " ".join(result.stderr.split())
    assert not (folder / "none").exists()


def test_the_programming_interface(folder: Path) -> None:
    latents = torch.randn(2, 16, 5, 4, 4)
    whole = flashvaed_cli.load(folder / "vae.safetensors", device="cpu", chunk=1)
    vae = flashvaed_cli.load(folder / "vae.safetensors", device="cpu")
    with memory_for(1), pytest.warns(UserWarning, match="out of memory") as told:
        less = vae.decode(latents)
    assert [str(one.message) for one in told] == [
        "out of memory: decoding again with chunk 2",
        "out of memory: decoding again with chunk 1",
    ]
    assert torch.equal(less, whole.decode(latents))
    vae = flashvaed_cli.load(folder / "vae.safetensors", device="cpu")
    with memory_for(0), pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        vae.decode(latents)


@pytest.mark.parametrize(
    ("chunk", "tile", "longer_side", "smaller"),
    [
        (21, None, 100, (8, None)),
        (3, 32, 100, (1, 32)),
        (1, None, 100, (1, 64)),
        (1, None, 64, (1, 32)),
        (1, 64, 40, (1, 32)),
        (1, 20, None, (1, 16)),
        (1, None, None, (1, 64)),
        (1, 8, 100, None),
        (1, None, 8, None),
    ],
)
def test_the_order_of_steps(
    chunk: int, tile: int | None, longer_side: int | None, smaller: tuple[int, int | None] | None
) -> None:
    assert smaller_steps([original_spec()], chunk, tile, longer_side) == smaller


def test_chunks_that_save_nothing_are_passed_over() -> None:
    """A decoder that sees frames ahead reads its halo with each."""
    spec = flash_ltx_spec()
    halo = sum(time_halo(spec))
    assert smaller_steps([spec], halo, None, 100) == (halo, 64)
    chunk, tile = smaller_steps([spec], 4 * halo, None, 100) or (0, 0)
    assert halo <= (chunk or 0) <= 2 * halo and tile is None
