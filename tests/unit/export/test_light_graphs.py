"""Light decoders as graphs of other programs: with one chain in each stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashvaed_cli.decoders.spec.blocks import ChainSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.light import LightShape
from flashvaed_cli.export.onnx_graph import GraphKind, OnnxOptions, export_onnx
from flashvaed_cli.progress import SilentProgress
from tests.light_toy import filled, light_toy_spec


def shallow(shape: LightShape) -> DecoderSpec:
    """With one chain in each stage."""
    spec = light_toy_spec(shape)
    stages = []
    for stage in spec.stages:
        chains = [block for block in stage.blocks if isinstance(block, ChainSpec)]
        others = [block for block in stage.blocks if not isinstance(block, ChainSpec)]
        stages.append(StageSpec(name=stage.name, blocks=(*chains[:1], *others), bypass=stage.bypass))
    return spec.model_copy(update={"stages": tuple(stages)})


@pytest.mark.parametrize(("shape", "kind"), [("tae", "step"), ("efficientvit", "clip")])
def test_onnx_gives_the_frames(tmp_path: Path, shape: LightShape, kind: GraphKind) -> None:
    """The export compares them with PyTorch's and raises where they differ."""
    (result,) = export_onnx(
        filled(shallow(shape)),
        tmp_path / "light.onnx",
        options=OnnxOptions(dtype=torch.float32),
        kinds=(kind,),
        progress=SilentProgress(),
    )
    assert result.target == f"onnx-{kind}"
    assert result.max_abs_difference <= result.tolerance
