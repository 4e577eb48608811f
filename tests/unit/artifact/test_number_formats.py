"""Weights in formats that are not floats are refused by name, in every layout, before anything is computed of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.registry import LAYOUTS as KNOWN
from tests.fuzz import seeds
from tests.unit.artifact.test_damaged_layers import save_or_skip

LAYOUTS = [name for name in seeds.FOREIGN if not name.startswith("tae")]
"""The light decoders' own readers have tests beside this one."""


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_that_is_no_float_is_named(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, tensors = seeds.foreign(name)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = [one for one, tensor in tensors.items() if tensor.is_floating_point() and "decoder." in one]
    parts = [one for one in weights if any(mark in one for mark in ("q.", "query", "scale_shift_table"))]
    for changed in (weights[0], weights[-1], *parts[:1]):
        content = {one: tensor.clone().contiguous() for one, tensor in tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            content[changed] = content[changed].to(dtype)
            save_or_skip(content, path)
            with pytest.raises(ArtifactError, match="cannot be read") as error:
                load_checkpoint(tmp_path if config is not None else path, builtins={}, family=seeds.FAMILY_OF[name])
        assert changed.removeprefix("vae.") in str(error.value)


@pytest.mark.parametrize("place", [0, 1])
def test_statistics_that_are_no_floats_are_named(place: int, tmp_path: Path) -> None:
    """Under the other names that they have in some files."""
    _, tensors = seeds.foreign("ltx-0.9.0-original")
    (names,) = KNOWN["ltx-0.9.0-original"].other_statistics
    statistics = {f"vae.{name}": torch.ones(128) for name in names}
    statistics[f"vae.{names[place]}"] = torch.ones(128, dtype=torch.complex64)
    content = {**tensors, **statistics}
    save_or_skip({name: tensor.clone().contiguous() for name, tensor in content.items()}, tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ArtifactError, match=rf"{names[place]} is torch\.complex64"):
            load_checkpoint(tmp_path / "x.safetensors", builtins={}, family="ltx-video-0.9.0")
