"""The decoder as `torch.export` programs, `.pt2`: PyTorch runs them without this program's code.

Inputs and outputs are those of the ONNX graphs: a clip at once, or steps with their caches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from flashvaed_cli.atomic import draft_folder
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.graphs import (
    TRACE_BATCH,
    TRACE_GRID,
    ClipGraph,
    StepGraph,
    dynamic_axes,
    first_caches,
    trace_grid,
    traceable_copy,
)
from flashvaed_cli.export.parity import copy_in, own_rounding, relative_difference, require_parity, seeded_latents
from flashvaed_cli.export.result import ExportResult

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CHECKS = ((2, TRACE_GRID), (1, (4, 4, 7)), (3, (1, 3, 2)))  # batch; latent frames, height, width


@torch.no_grad()
def export_pt2(decoder: Decoder, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> ExportResult:
    """Write `NAME.pt2`, whole clips, and for causal decoders `NAME.step.first.pt2` and `NAME.step.next.pt2`.

    Raises:
        ExportError: torch cannot export the decoder, or what is loaded again decodes differently. No file is written.
    """
    traceable = traceable_copy(decoder, dtype)
    latents = seeded_latents(decoder.spec, trace_grid(decoder.spec), seed=seed, batch=TRACE_BATCH).to(dtype)
    graphs: dict[str, tuple[ClipGraph | StepGraph, list[torch.Tensor]]] = {path.name: (ClipGraph(traceable), [latents])}
    if decoder.spec.is_causal and not decoder.spec.still:
        caches = first_caches(traceable, latents)
        step = StepGraph(traceable, tuple(caches))
        graphs[f"{path.stem}.step.first.pt2"] = step, [latents]
        graphs[f"{path.stem}.step.next.pt2"] = step, [latents, *caches.values()]
    with draft_folder(path) as draft:
        for name, (graph, inputs) in graphs.items():
            _save(graph, inputs, draft / name)
        modules = [torch.export.load(draft / name).module() for name in graphs]
        difference, allowed = _compared(decoder, modules, dtype, seed, path.name)
        size_bytes = sum(file.stat().st_size for file in draft.iterdir())
        for name in graphs:
            (draft / name).replace(path.with_name(name))
    paths = tuple(path.with_name(name) for name in graphs)
    return ExportResult("pt2", paths, size_bytes, difference, allowed, f"torch {torch.__version__}")


def _save(graph: ClipGraph | StepGraph, inputs: list[torch.Tensor], file: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about itself
            program = torch.export.export(
                graph.eval(), tuple(inputs), dynamic_shapes=dynamic_axes(inputs), strict=False
            )
            torch.export.save(program, file)
    except Exception as error:  # the exporter's exceptions share no parent of their own
        reason = str(error).splitlines()[0]
        raise ExportError(f"torch {torch.__version__} cannot export the decoder to {file.name}: {reason}") from error


def _compared(
    decoder: Decoder, modules: Sequence[torch.nn.Module], dtype: torch.dtype, seed: int, name: str
) -> tuple[float, float]:
    """The largest difference at every size, and what was allowed."""
    reference = copy_in(decoder, torch.float32)
    worst, allowed = 0.0, 0.0
    for batch, grid in _CHECKS:
        size = (1 if decoder.spec.still else grid[0], grid[1], grid[2])
        latents = seeded_latents(decoder.spec, size, seed=seed, batch=batch)
        expected = decode(reference, latents)
        found = [modules[0](latents.to(dtype))]
        if len(modules) > 1:
            found.append(_in_steps(modules[1], modules[2], latents.to(dtype)))
        for frames in found:
            difference = relative_difference(frames.float(), expected)
            limit = require_parity(
                difference,
                TOLERANCES[dtype],
                where=f"{name}, loaded again, latents {list(latents.shape)},",
                rounding=None if dtype == torch.bfloat16 else partial(own_rounding, decoder, latents, dtype),
            )
            worst, allowed = max(worst, difference), max(allowed, limit)
    return worst, allowed


def _in_steps(first: torch.nn.Module, following: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """One latent frame a step."""
    parts = list(latents.split(1, dim=2))
    frames, *caches = first(parts[0])
    found = [frames]
    for part in parts[1:]:
        frames, *caches = following(part, *caches)
        found.append(frames)
    return torch.cat(found, dim=2)
