"""What is offered as the next command can be typed: the command has those flags, and fits the decoder."""

from __future__ import annotations

import shlex

import pytest
import typer.main

from flashvaed_cli.artifact.header import ArtifactHeader, Lineage
from flashvaed_cli.cli.app import app
from flashvaed_cli.decoders.spec.light import light_spec
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.stages.info.next_step import next_commands

MEASURED = {
    "prune": {"selection": [], "parameters_before": 2, "parameters_after": 1},
    "convert-ops": {"operators": {}, "gflop_9x256x256_before": 2.0, "gflop_9x256x256_after": 1.0},
    "distill": {"phases": []},
}


def made_by(command: str, family: str, *, is_light: bool = False) -> ArtifactHeader:
    decoder = FAMILIES[family].decoder_spec(8, FAMILIES[family].latent_width)
    return ArtifactHeader(
        kind="decoder",
        family=family,
        decoder=light_spec("tae", decoder, 8) if is_light else decoder,
        latent_mean=(),
        latent_std=(),
        original=Lineage(role="original", location="vae", sha256="0" * 64),
        measured=MEASURED[command],
    )


@pytest.mark.parametrize("data", [None, [], ["clips {1}/", "more.mp4"]])
@pytest.mark.parametrize("is_light", [False, True])
@pytest.mark.parametrize("family", ["wan2.1", "sdxl", "leanvae"])
@pytest.mark.parametrize("command", MEASURED)
def test_every_flag_is_one_of_its_command(command: str, family: str, is_light: bool, data: list[str] | None) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    following = next_commands("x.safetensors", made_by(command, family, is_light=is_light), None, data=data)
    assert following
    for line in following:
        _, name, *words = shlex.split(line)
        known = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line
        if data:
            fitted = [word for word in words if word in data]
            assert fitted == (data if name in ("prune", "convert-ops", "distill") else []), line


@pytest.mark.parametrize(
    ("family", "is_light", "expected"),
    [("wan2.1", False, "convert-ops"), ("leanvae", False, "distill"), ("wan2.1", True, "distill")],
)
def test_operators_are_converted_where_the_family_has_others(family: str, is_light: bool, expected: str) -> None:
    (first, *_) = next_commands("x.safetensors", made_by("prune", family, is_light=is_light), None)
    assert first.split()[1] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_offered_that_the_family_has(family: str) -> None:
    """diffusers has no class for LeanVAE and SeedVR2."""
    *_, last = next_commands("x.safetensors", made_by("distill", family), None)
    assert last.endswith("-t onnx" if family in ("leanvae", "seedvr2") else "-t diffusers")
