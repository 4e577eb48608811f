"""Suggest the next command for a file, by its kind."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.measured import ConversionRecord, DistillRecord, PruneRecord
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.families.registry import FAMILIES, class_layout

_USES = ("eval {file} --data clips/", "decode latents.pt -d {file} -o video.mp4", "export {file} -t {target}")
_BEGINNING = (
    "analyze {file}",
    "prune {file} --ratio 0.25",
    "convert-ops {file} --profile exact -o exact.safetensors",
)
_AFTER = {
    "analyze": ("prune {parent} --analysis {file} --ratio 0.25",),
    "prune": ("convert-ops {file}", "eval {file} --data clips/"),
    "convert-ops": ("distill {file} --data clips/", "eval {file} --data clips/"),
    "distill": _USES,
}
_FIT = ("prune", "convert-ops", "distill")
"""Commands that fit weights to clips."""


def next_commands(
    location: str, header: ArtifactHeader | None, checkpoint: Checkpoint | None, *, data: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Commands that suit a file, the next step of the pipeline first.

    Args:
        data: the clips of the last fit, suggested for the next one; None if unknown.
    """
    file = shlex.quote(location)
    made_by = _command_of(header)
    if checkpoint is not None and checkpoint.decoder is None:
        return ()
    if header is None or made_by is None or header.original is None:
        templates = _BEGINNING
        if checkpoint is not None and not _can_be_converted(checkpoint.family):
            templates = tuple(one for one in templates if not one.startswith("convert-ops"))
        if checkpoint is not None and checkpoint.encoder is None:
            templates = ("decode latents.pt -d {file} -o video.mp4",)
    else:
        templates = _USES if _is_finished(header) else _AFTER[made_by]
        is_light = header.decoder is not None and light_shape(header.decoder) is not None
        if made_by == "prune" and (is_light or not _can_be_converted(header.family)):
            templates = _AFTER["convert-ops"]  # its operators are light already
    family = header.family if header is not None else None if checkpoint is None else checkpoint.family
    target = "onnx" if family in FAMILIES and class_layout(family) is None else "diffusers"
    if data is not None:
        templates = tuple(_with_data(template, data) for template in templates)
    parent = "" if header is None or not header.parents else shlex.quote(header.parents[0].location)
    return tuple("flashvaed " + template.format(file=file, parent=parent, target=target) for template in templates)


def _with_data(template: str, data: Sequence[str]) -> str:
    """Add the clips of this step to commands that fit weights, and other clips to commands that judge."""
    command = template.split()[0]
    clips = "".join(f" --data {shlex.quote(place)}" for place in data) if command in _FIT else ""
    if command == "eval" and data:
        clips = " --data held-out/"
    return template.removesuffix(" --data clips/") + clips.replace("{", "{{").replace("}", "}}")


def _can_be_converted(family_name: str) -> bool:
    """Whether a family has operators to convert; the layers of others are light already."""
    family = FAMILIES.get(family_name)
    return family is None or bool(family.paper_operators)


def _command_of(header: ArtifactHeader | None) -> str | None:
    """The command that wrote an artifact, recognised by what it measured."""
    if header is None:
        return None
    if header.kind == "analysis":
        return "analyze"
    records = {"distill": DistillRecord, "prune": PruneRecord, "convert-ops": ConversionRecord}
    return next((command for command, record in records.items() if record.of(header) is not None), None)


def _is_finished(header: ArtifactHeader) -> bool:
    """Whether no further step of the pipeline is needed: exact operators, single images, native layouts."""
    return header.recipe.get("profile") in ("exact", "image") or header.recipe.get("layout") == "native"
