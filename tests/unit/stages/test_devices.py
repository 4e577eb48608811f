"""Which devices `--device` takes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.stages.common.loading import choose_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_exists_is_taken_by_its_index() -> None:
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda") == choose_device("gpu") == torch.device("cuda")
    with pytest.raises(FlashVaedError, match=r"--device cuda:2: .* available: cuda, .*cuda:0, cuda:1"):
        choose_device("cuda:2")


def test_gpu_is_whichever_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("gpu") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(FlashVaedError, match="--device gpu: this machine has none"):
        choose_device("gpu")


def test_an_index_without_any_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FlashVaedError, match="--device cuda:0: this machine has none"):
        choose_device("cuda:0")


@pytest.mark.parametrize("name", ["auto", "cpu", "gpu", "mps", "cuda", "cuda:0", "cuda:15"])
def test_recipes_take(name: str) -> None:
    assert AnalyzeRecipe(device=name).device == name


@pytest.mark.parametrize(
    "name", ["GPU:0", "gpu0", "cuda:", "cuda:-1", "cuda:x", "cuda1", "tpu", "cpu:0", "", "cuda:0\n"]
)
def test_recipes_refuse_with_a_hint(name: str) -> None:
    hint = "a GPU is called gpu, cuda" if "gpu" in name.lower() else "is not a device: give auto, cpu, gpu, cuda, mps"
    with pytest.raises(ValidationError, match=hint):
        AnalyzeRecipe(device=name)
