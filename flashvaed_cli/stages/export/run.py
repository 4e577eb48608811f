"""`flashvaed export`: a decoder for other programs, each file checked before it appears."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flashvaed_cli.artifact.checkpoint import BUILTIN_SCHEME, Checkpoint
from flashvaed_cli.errors import ArtifactError, DecodeError, ExportError
from flashvaed_cli.export.onnx_graph import GraphKind, OnnxOptions, export_onnx
from flashvaed_cli.export.pt2 import export_aoti, export_pt2
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.recipe.fields import ExportTarget
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.loading import DTYPES, choose_device
from flashvaed_cli.stages.common.outputs import filled_at_the_end, hashes_of
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.common.up_to_date import finished_folder, provenance
from flashvaed_cli.stages.export.comfyui import COMFYUI_FOLDER, export_comfyui
from flashvaed_cli.stages.export.layouts import (
    DIFFUSERS_FOLDER,
    diffusers_obstacle,
    export_diffusers_folder,
    export_original_layout,
)
from flashvaed_cli.stages.export.model_card import CARD, model_card

MANIFEST = "export.json"
_WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin")
_Job = tuple[ExportTarget, Callable[[], list[ExportResult]]]


@dataclass
class _Tally:
    """The targets so far: written, failed (with the reason), or not meant for this decoder."""

    results: list[ExportResult] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """The notes of all results, each once, in the order of the targets."""
        return tuple(dict.fromkeys([*(note for result in self.results for note in result.notes), *self.skipped]))


def run_export(recipe: ExportRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Write the targets of the recipe into a folder; read each back and compare it with the decoder.

    If a target fails the others go on; `failed` in the figures and in the manifest says which, and why.

    Raises:
        ArtifactError: the decoder cannot be loaded.
        ExportError: no target could be written.
        FlashVaedError: the output folder holds files of something else.
    """
    run = Run.open_folder(recipe, MANIFEST, progress=progress, force=force, command_line=command_line)
    output, location = run.output, run.location
    done = finished_folder(output / MANIFEST, recipe, location, list, force=force)
    if done is not None and not done.figures.get("failed"):
        return done
    checkpoint = run.load_alone()
    with filled_at_the_end(output, MANIFEST, reads=(location,), force=force) as draft:
        tally = _write_targets(checkpoint, draft, export_name(location), recipe, progress)
        table = _table(tally.results, draft)
        manifest = {
            "kind": "flashvaed-export",
            "command": command_line,
            "decoder": location,
            "sha256": checkpoint.sha256,
            "made_with": provenance(recipe, _hashes(location, checkpoint, recipe.original), ()),
            "files": [result.to_record(draft) for result in tally.results],
            "failed": tally.failed,
        }
        files = [[path.relative_to(draft).as_posix() for path in result.paths] for result in tally.results]
        card = model_card(checkpoint, export_name(location), tally.results, files)
        (draft / CARD).write_text(card, encoding="utf-8")
        manifest["sha256_of_files"] = hashes_of(draft)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    paths = [output / path.relative_to(draft) for result in tally.results for path in result.paths]
    return StageOutcome((*paths, output / CARD, output / MANIFEST), (table,), manifest, tally.notes())


def _hashes(location: str, checkpoint: Checkpoint, named: str | None) -> dict[str, str]:
    """The hashes that an export depends on: of the decoder, and of the original, whose encoder it contains."""
    original = None if checkpoint.header is None else checkpoint.header.original
    return {location: checkpoint.sha256} | ({} if original is None else {named or original.location: original.sha256})


def export_name(location: str) -> str:
    """The name of the files: that of the input folder, or of the input file without its suffix."""
    if location.startswith(BUILTIN_SCHEME):
        return location.replace(":", "-")
    path = Path(location.rstrip("/"))
    name = path.name or path.resolve().name or "decoder"
    return name if path.is_dir() else name.removesuffix(next((s for s in _WEIGHT_SUFFIXES if name.endswith(s)), ""))


def _write_targets(checkpoint: Checkpoint, folder: Path, name: str, recipe: ExportRecipe, progress: Progress) -> _Tally:
    tally = _Tally()
    for target, job in _jobs(checkpoint, folder, name, recipe, progress, tally.skipped):
        try:
            tally.results += job()
        except (ExportError, ArtifactError, DecodeError) as error:
            tally.failed.append({"target": target, "reason": str(error)})
    if not tally.results:
        raise ExportError("\n".join(["nothing was written:", *(entry["reason"] for entry in tally.failed)]))
    return tally


def _jobs(
    checkpoint: Checkpoint, folder: Path, name: str, recipe: ExportRecipe, progress: Progress, skipped: list[str]
) -> Iterator[_Job]:
    """The targets to write, each with its function; those that do not apply to this decoder are added to `skipped`."""
    decoder = checkpoint.require_decoder()
    if "safetensors" in recipe.targets:
        yield "safetensors", lambda: [export_original_layout(checkpoint, folder / f"{name}.safetensors", recipe)]
    if "diffusers" in recipe.targets:
        obstacle = None if "targets" in recipe.model_fields_set else diffusers_obstacle(checkpoint)
        if obstacle is None:
            yield "diffusers", lambda: [export_diffusers_folder(checkpoint, folder / DIFFUSERS_FOLDER, recipe)]
        else:
            skipped.append(obstacle)
    if "comfyui" in recipe.targets:
        yield "comfyui", lambda: [export_comfyui(checkpoint, folder / COMFYUI_FOLDER, name, recipe)]
    if "pt2" in recipe.targets:
        program = folder / f"{name}.pt2"
        given = {"dtype": DTYPES[recipe.dtype], "seed": recipe.seed, "progress": progress}
        yield "pt2", lambda: [export_pt2(decoder, program, **given)]
    if "aoti" in recipe.targets:
        package, device = folder / f"{name}.aoti.pt2", choose_device(recipe.device)
        settings = {"device": device, "dtype": DTYPES[recipe.dtype], "seed": recipe.seed, "progress": progress}
        yield "aoti", lambda: [export_aoti(decoder, package, **settings)]
    if "onnx" not in recipe.targets:
        return
    if recipe.dtype == "bfloat16" and "targets" not in recipe.model_fields_set:
        skipped.append("no ONNX graphs: these are float32 or float16")
        return
    options = OnnxOptions(
        dtype=DTYPES[recipe.dtype],
        opset=recipe.opset,
        latent_mean=checkpoint.latent_mean or None,
        latent_std=checkpoint.latent_std or None,
        seed=recipe.seed,
    )
    kinds: tuple[GraphKind, ...] = ("clip", "step")
    if decoder.spec.still:
        kinds = ("clip",)
        skipped.append("no streaming graph: an image has no next step")
    elif not decoder.spec.is_causal:
        kinds = ("clip",)
        sight = "whole clips" if decoder.spec.sees_whole_clip else "frames ahead"
        skipped.append(f"no streaming graph: this decoder sees {sight}, so a single step gives no frames")
    elif decoder.spec.grows_state:
        kinds = ("clip",)
        skipped.append("no streaming graph: this decoder's state grows from step to step")
    path = folder / f"{name}.onnx"
    yield "onnx", lambda: export_onnx(decoder, path, options=options, kinds=kinds, progress=progress)


def _table(results: list[ExportResult], folder: Path) -> TableData:
    columns = (
        Column("target", align="left"),
        Column("file", align="left"),
        Column("MB", ".2f"),
        Column("difference / range", ".1e"),
        Column("allowed", ".0e"),
    )
    rows = tuple(
        (
            result.target,
            ", ".join(path.relative_to(folder).as_posix() for path in result.paths),
            result.size_bytes / 1e6,
            result.max_abs_difference,
            result.tolerance,
        )
        for result in results
    )
    return TableData("Exports, each compared with the decoder's own frames", columns, rows)
