"""Half precision that makes a processor slower: said once, before long work, and only there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.metrics import roofline
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.stages.common import loading
from flashvaed_cli.stages.common.loading import FEWEST_GFLOP, warn_of_slow_format
from tests.commands import invoke, succeed
from tests.toy import write_toy_vae

CPU = torch.device("cpu")
SAID = (
    "this processor multiplies float32 1.9 times as fast as bfloat16: --dtype float32 takes less time, and more memory"
)


def heard(gain: float, monkeypatch: pytest.MonkeyPatch, **changed: object) -> list[str]:
    monkeypatch.setattr(loading, "float32_speedup", lambda _: gain)
    progress = SilentProgress()
    asked = {"dtype": "bfloat16", "device": CPU, "gflop": FEWEST_GFLOP} | changed
    warn_of_slow_format(**asked, progress=progress)  # type: ignore[arg-type]
    return progress.warnings


def test_slow_formats_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard(1.93, monkeypatch) == [SAID]
    assert heard(1.1, monkeypatch) == heard(0.5, monkeypatch) == []
    for other in ({"dtype": "float32"}, {"device": torch.device("meta")}, {"gflop": FEWEST_GFLOP / 2}):
        assert heard(1.93, monkeypatch, **other) == []


def test_decode_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "float32_speedup", lambda _: 1.93)
    write_toy_vae(tmp_path / "vae.safetensors")
    for name in ("a", "b"):
        save_file({"latents": torch.zeros(1, 16, 1, 2, 2)}, tmp_path / f"{name}.safetensors")
    command = "decode a.safetensors b.safetensors -d vae.safetensors -o out --dtype bfloat16 --latent-scale raw"
    assert SAID not in succeed(command, cwd=tmp_path)["stderr"]  # soon done
    monkeypatch.setattr(loading, "FEWEST_GFLOP", 0.0)
    assert succeed(f"{command} --force", cwd=tmp_path)["stderr"].count(SAID) == 1


def test_distill_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "float32_speedup", lambda _: 1.93)
    monkeypatch.setattr(loading, "FEWEST_GFLOP", 0.0)
    write_toy_vae(tmp_path / "vae.safetensors")
    save_file({"latents": torch.zeros(2, 16, 1, 2, 2)}, tmp_path / "a.safetensors")
    command = "distill vae.safetensors --phase 3 --num-steps 1 --data a.safetensors --dtype bfloat16 -o out.safetensors"
    command = f"{command} --loss-weight lpips=0"

    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as before_the_end:
        before_the_end.setattr("flashvaed_cli.stages.distill.run._finish", interrupted)
        assert invoke(command, cwd=tmp_path).stderr.count(SAID) == 1
    assert (tmp_path / "out.phase1.ckpt").exists()
    (tmp_path / "out.losses.png").mkdir()
    ended = succeed(command, cwd=tmp_path)
    assert SAID not in ended["stderr"]  # a run goes on in its own format only
    said = "the decoder is written, but its loss curves are not: out.losses.png: Is a directory. out.log.jsonl has the"
    assert said in " ".join(ended["stderr"].split())
    assert (tmp_path / "out.safetensors").is_file() and not list(tmp_path.glob("*.ckpt"))


def test_formats_are_compared_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.random.get_rng_state()
    for dtype in (torch.bfloat16, torch.float16):
        assert 0 < roofline.float32_speedup(dtype) < math.inf
    assert torch.equal(torch.random.get_rng_state(), state)
    rates = iter([300.0, 100.0, 200.0, 150.0])  # float32 and bfloat16 in turns
    monkeypatch.setattr(roofline, "_matmul_rate", lambda *_: next(rates))
    assert roofline.float32_speedup(torch.bfloat16) == 2.0
