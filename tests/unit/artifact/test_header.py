from __future__ import annotations

import json

import pytest
from artifact_specs import DECODER_SPEC, ENCODER_SPEC, header
from pydantic import ValidationError

from flashvaed_cli.artifact.header import SCHEMA_VERSION, Lineage, dump_header, parse_header
from flashvaed_cli.errors import ArtifactError


def test_round_trip() -> None:
    parent = Lineage(role="decoder", location="builtin:tiny-wan", sha256="ab" * 32)
    full = header(
        kind="vae",
        decoder=DECODER_SPEC,
        encoder=ENCODER_SPEC,
        kept_channels={"up2.0": (0, 3, 5, 6, 7, 8, 9, 11), "up2.0.conv1": tuple(range(8))},
        recipe={"keep_ratio": 0.25, "stages": ("up2", "up3")},
        command_line="flashvaed prune --ratio 0.25",
        seed=7,
        original=parent,
        parents=(parent,),
        measured={"psnr_db": 31.5, "losses": [1.0, 0.5], "broken": float("nan")},
    )
    again = parse_header(dump_header(full), "x.safetensors")
    assert again == full
    assert again.measured["broken"] is None
    assert again.kept_channels["up2.0"] == (0, 3, 5, 6, 7, 8, 9, 11)


def test_text_does_not_depend_on_the_order_of_figures() -> None:
    assert dump_header(header(measured={"a": 1, "b": 2})) == dump_header(header(measured={"b": 2, "a": 1}))


@pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, {"a": {"b": {1, 2}}}])
def test_only_json_values(value: dict) -> None:
    with pytest.raises(ValidationError):
        header(measured=value)


def test_newer_schema_says_upgrade() -> None:
    raw = json.loads(dump_header(header())) | {"schema_version": SCHEMA_VERSION + 1, "tool": "9.9", "news": 1}
    with pytest.raises(ArtifactError, match=r"x: written by flashvaed 9\.9 .*Upgrade"):
        parse_header(json.dumps(raw), "x")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"schema_version": 1}', '{"schema_version": "1"}'])
def test_damaged_header_is_named(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"^x: "):
        parse_header(text, "x")
