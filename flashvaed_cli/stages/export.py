"""`flashvaed export`: a decoder for other programs, each file checked before it appears."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flashvaed_cli.artifact.checkpoint import FAMILY_KEY, Checkpoint, load_checkpoint
from flashvaed_cli.artifact.key_tables import original_layout
from flashvaed_cli.artifact.layouts import to_foreign
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.expansion import expanded_decoder
from flashvaed_cli.decoders.families import get_family, original_like
from flashvaed_cli.export.checkpoint_file import export_safetensors
from flashvaed_cli.export.onnx_graph import OnnxOptions, export_onnx_clip, export_onnx_step
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.export.uniform_layout import fits_uniform_layout
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.export import ExportRecipe
from flashvaed_cli.report.tables import Column, TableData, to_records
from flashvaed_cli.stages.folders import filled_at_the_end, moved, refuse_foreign_folder
from flashvaed_cli.stages.loading import DTYPES, choose_input, load_input, with_plain_operators
from flashvaed_cli.stages.result import StageOutcome

MANIFEST = "export.json"
_EXPANDED = "safetensors: the low-rank time_conv layers are written as whole kernels, which cost what they did before"
_CHECK_GRID = (3, 6, 8)


def run_export(recipe: ExportRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Write the targets of the recipe into a folder, each read back and compared with the decoder.

    Raises:
        ArtifactError: the decoder cannot be loaded.
        ExportError: a target does not fit, or does not reproduce the decoder.
        FlashVaedError: the output folder holds files of something else.
    """
    output = Path(recipe.output)
    refuse_foreign_folder(output, MANIFEST, force=force)
    location = choose_input(recipe.input, ExportRecipe, progress)
    checkpoint = with_plain_operators(load_input(location, recipe.family, progress))
    name = Path(location.replace(":", "-")).stem
    with filled_at_the_end(output, MANIFEST) as draft:
        results, skipped = _write_targets(checkpoint, draft, name, recipe, progress)
        table = _table(results)
        notes = tuple(dict.fromkeys([*(note for result in results for note in result.notes), *skipped]))
        manifest = {
            "command": command_line,
            "decoder": location,
            "sha256": checkpoint.sha256,
            "files": to_records(table),
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    paths = moved(tuple(path for result in results for path in result.paths), output)
    return StageOutcome((*paths, output / MANIFEST), (table,), manifest, notes)


def _write_targets(
    checkpoint: Checkpoint, folder: Path, name: str, recipe: ExportRecipe, progress: Progress
) -> tuple[list[ExportResult], list[str]]:
    """What was written, and why something was not."""
    decoder = checkpoint.require_decoder()
    results: list[ExportResult] = []
    skipped: list[str] = []
    if "safetensors" in recipe.targets:
        results.append(_export_original_layout(checkpoint, folder / f"{name}.safetensors", recipe))
    if "onnx" in recipe.targets:
        options = OnnxOptions(
            dtype=DTYPES[recipe.dtype],
            opset=recipe.opset,
            latent_mean=checkpoint.latent_mean or None,
            latent_std=checkpoint.latent_std or None,
            seed=recipe.seed,
        )
        results.append(export_onnx_clip(decoder, folder / f"{name}.onnx", options=options, progress=progress))
        if decoder.spec.still:
            skipped.append("no streaming graph: an image has no next step")
        elif decoder.spec.is_causal:
            results.append(export_onnx_step(decoder, folder / f"{name}.step.onnx", options=options, progress=progress))
        else:
            skipped.append("no streaming graph: this decoder sees frames ahead, so a step alone has no frames")
    return results, skipped


def _export_original_layout(checkpoint: Checkpoint, path: Path, recipe: ExportRecipe) -> ExportResult:
    """The family's own key layout, with the encoder where the checkpoint holds one, and the latent statistics."""
    decoder, encoder = expanded_decoder(checkpoint.require_decoder()), checkpoint.encoder
    expanded = () if decoder.spec == checkpoint.require_decoder().spec else (_EXPANDED,)
    family, layout = get_family(checkpoint.family), original_layout(checkpoint.family)
    tensors = to_foreign(decoder.state_dict(), decoder.spec, layout)
    if encoder is not None:
        tensors |= to_foreign(encoder.state_dict(), encoder.spec, layout)
    dtype = DTYPES[recipe.dtype]
    fit = fits_uniform_layout(decoder.spec, original_like(decoder.spec))
    notes = fit.notes(None if encoder is None else encoder.spec.stages[0].blocks[0].conv.out_width)  # type: ignore[union-attr]
    if fit.base_width is not None and family.uniform_note is not None:
        notes = (family.uniform_note.format(base_width=fit.base_width),)
    described = {key: value for one in (decoder, encoder) if one for key, value in family.described(one.spec).items()}
    statistics = {"latents_mean": checkpoint.latent_mean, "latents_std": checkpoint.latent_std}
    return export_safetensors(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        path,
        {
            "format": "pt",
            FAMILY_KEY: checkpoint.family,
            **{key: json.dumps(values) for key, values in statistics.items() if values},
            **({"config": json.dumps(described)} if described else {}),
        },
        reload=_reload_decoder,
        decoder=decoder,
        latents=_check_latents(checkpoint, recipe.seed),
        notes=(*expanded, *notes),
    )


def _reload_decoder(path: Path) -> Decoder:
    return load_checkpoint(path, builtins={}).require_decoder()


def _check_latents(checkpoint: Checkpoint, seed: int) -> torch.Tensor:
    spec = checkpoint.require_decoder().spec
    num_latents, height, width = _CHECK_GRID
    grid = (1 if spec.still else num_latents, height, width)
    mean, std = checkpoint.latent_mean or None, checkpoint.latent_std or None
    return seeded_latents(spec, grid, seed=seed, latent_mean=mean, latent_std=std)


def _table(results: list[ExportResult]) -> TableData:
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
            ", ".join(path.name for path in result.paths),
            result.size_bytes / 1e6,
            result.max_abs_difference,
            result.tolerance,
        )
        for result in results
    )
    return TableData("Exports, each compared with the decoder's own frames", columns, rows)
