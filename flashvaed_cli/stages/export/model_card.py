"""`README.md` of an export: a model card, as on the Hub, for the decoder and the files written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flashvaed_cli import __version__
from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.latent_patches import are_per_place
from flashvaed_cli.export.result import ExportResult, Target
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.printable import printable
from flashvaed_cli.stages.common.reports import find_reports

CARD = "README.md"
_USES: dict[Target, str] = {
    "safetensors": "**The family's own key layout**, `{file}`: for programs that load the original VAE by its names, "
    "if their classes have these widths; `flashvaed` reads it again.",
    "diffusers": '**diffusers**: `AutoencoderKL....from_pretrained("{folder}")`, the class that `config.json` names. '
    'If that is `AutoencoderFlash`: `AutoModel.from_pretrained("{folder}", trust_remote_code=True)`, with flashvaed '
    "installed.",
    "onnx-clip": '**ONNX**, whole clips: `onnxruntime.InferenceSession("{file}")`, input `latents` (raw, '
    "`[B, C, T, H, W]`), output `frames` in [-1, 1]. Keep the `.onnx.data` file beside the graphs: it holds the "
    "weights of all of them. OpenVINO reads the same files.",
    "onnx-step": "**ONNX**, streaming: `{file}` for the first latents, then the `next` graph; each output "
    "`future_NAME` is the next step's `past_NAME` input.",
    "pt2": '**PyTorch without flashvaed**: `torch.export.load("{file}").module()(latents)`; the `step` programs take '
    "and give the caches that the ONNX steps do.",
    "aoti": '**PyTorch, compiled**: `torch._inductor.aoti_load_package("{file}")(latents)`, on a machine like the one '
    "that wrote it.",
    "comfyui": "**ComfyUI**: `{file}`; put a single file into `models/vae`, or the folder (it has a README) into "
    "`custom_nodes`.",
}


def model_card(
    checkpoint: Checkpoint, name: str, results: Sequence[ExportResult], files: Sequence[Sequence[str]]
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        name: the export's.
        results: the exports written.
        files: those of each result, relative to the card.
    """
    spec = checkpoint.require_decoder().spec
    parts = [
        _front_matter(checkpoint, results),
        f"# {printable(name)}\n",
        _what(checkpoint, spec),
        "## Use\n",
        *(_use(result, paths) for result, paths in zip(results, files, strict=True)),
        _latents(checkpoint, spec),
        _history(checkpoint),
        *_figures(checkpoint),
        "## Checks\n\nLargest difference of the frames to the decoder's own, as a fraction of their range.\n",
        _checks(results, files),
    ]
    return "\n".join(parts)


def _front_matter(checkpoint: Checkpoint, results: Sequence[ExportResult]) -> str:
    lines = ["---"]
    elsewhere = get_family(checkpoint.family).elsewhere
    if elsewhere.repository is not None:
        lines += [f"base_model: {elsewhere.repository}", f"license: {elsewhere.licence}"]
    if any(result.target == "diffusers" for result in results):
        lines += ["library_name: diffusers"]
    lines += ["tags:", "- vae", "- video", f"- {checkpoint.family}", "- flashvaed", "---", ""]
    return "\n".join(lines)


def _what(checkpoint: Checkpoint, spec: DecoderSpec) -> str:
    millions = checkpoint.require_decoder().parameter_count / 1e6
    return (
        f"A decoder for latents of {checkpoint.family}, {millions:.2f} M parameters, written by flashvaed "
        f"{__version__}. It takes the same latents as the original decoder. The licence of the base model holds for "
        "what is derived from it.\n"
    )


def _use(result: ExportResult, paths: Sequence[str]) -> str:
    use = "- " + _USES[result.target].format(file=paths[0], folder=paths[0].rpartition("/")[0])
    return "\n".join([use, *(f"  - {printable(note.removeprefix(f'{result.target}: '))}" for note in result.notes)])


def _latents(checkpoint: Checkpoint, spec: DecoderSpec) -> str:
    lines = [
        "",
        f"Latents have {spec.latent_width} channels; T latent frames give 1 + {spec.temporal_factor} (T - 1) frames, "
        f"{spec.spatial_factor} times as high and wide.",
    ]
    if checkpoint.latent_mean and checkpoint.latent_std:
        mean, std = (json.dumps([float(f"{x:.6g}") for x in row]) for row in checkpoint.require_statistics())
        per_place = are_per_place(len(checkpoint.latent_mean), spec.latent_width)
        patches = ", of patches of 2x2 as channels (C, row, column)" if per_place else ""
        lines += [
            f"Diffusion models use normalized latents, (raw - mean) / std{patches}:",
            "",
            f"- mean {mean}",
            f"- std {std}",
        ]
    return "\n".join([*lines, ""])


def _history(checkpoint: Checkpoint) -> str:
    header = checkpoint.header
    lines = ["## How it was made", ""]
    if header is None or header.original is None:
        return "\n".join([*lines, f"From `{printable(checkpoint.location)}` (SHA-256 `{checkpoint.sha256}`).", ""])
    lines += [f"From `{printable(header.original.location)}` (SHA-256 `{header.original.sha256}`); the last command:"]
    lines += ["", "```", printable(header.command_line), "```", ""]
    if header.recipe:
        lines += ["with the settings", "", "```json", printable(json.dumps(header.recipe)), "```", ""]
    return "\n".join(lines)


def _figures(checkpoint: Checkpoint) -> list[str]:
    """The figures of evaluations in folders beside the decoder."""
    lines: list[str] = []
    for folder, figures in find_reports(Path(checkpoint.location), checkpoint.sha256).items():
        lines += [f"From `{printable(folder)}/report.json`:", ""]
        lines += [f"- {name}: {printable(text)}" for name, text in figures.items()]
        lines += [""]
    return ["## Figures", "", *lines] if lines else []


def _checks(results: Sequence[ExportResult], files: Sequence[Sequence[str]]) -> str:
    rows = ["| target | files | bytes | largest difference | checked with |", "|---|---|--:|--:|---|"]
    rows += [
        f"| {result.target} | {', '.join(paths)} | {result.size_bytes:,d} | {result.max_abs_difference:.1e} "
        f"| {result.checked_with} |"
        for result, paths in zip(results, files, strict=True)
    ]
    return "\n".join([*rows, ""])
