from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.stages.prune.run import _read_statistics
from tests.toy import original_spec

SPEC = original_spec()
WIDTHS = tensor_widths(SPEC)
FIRST = next(iter(WIDTHS))


def _drop(tensors: dict[str, torch.Tensor], measured: dict[str, Any]) -> None:
    del tensors[f"covariance.{FIRST}"]


def _narrow(tensors: dict[str, torch.Tensor], measured: dict[str, Any]) -> None:
    tensors[f"covariance.{FIRST}"] = torch.eye(1)


def _not_finite(tensors: dict[str, torch.Tensor], measured: dict[str, Any]) -> None:
    tensors[f"mean.{FIRST}"][0] = torch.nan


def _no_clips(tensors: dict[str, torch.Tensor], measured: dict[str, Any]) -> None:
    measured["clips"] = []


def _odd_count(tensors: dict[str, torch.Tensor], measured: dict[str, Any]) -> None:
    measured["clips"]["positions"][FIRST] = "many"


@pytest.mark.parametrize("damage", [None, _drop, _narrow, _not_finite, _no_clips, _odd_count])
def test_statistics_of_another_shape_are_named(damage: Callable | None) -> None:
    tensors = {f"covariance.{address}": torch.eye(width) for address, width in WIDTHS.items()}
    tensors |= {f"mean.{address}": torch.zeros(width) for address, width in WIDTHS.items()}
    measured: dict[str, Any] = {"clips": {"positions": dict.fromkeys(WIDTHS, 100)}}
    if damage is not None:
        damage(tensors, measured)
    header = ArtifactHeader(kind="analysis", family=SPEC.family, latent_mean=(), latent_std=(), measured=measured)
    if damage is None:
        assert _read_statistics("a", header, tensors, SPEC).keys() == WIDTHS.keys()
        return
    with pytest.raises(ArtifactError, match=rf"a: damaged: its covariance of {FIRST}"):
        _read_statistics("a", header, tensors, SPEC)
