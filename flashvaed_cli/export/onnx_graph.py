"""The decoder as ONNX: a graph for whole clips and two for streaming with explicit caches, weights in a shared file.

All take raw latents `[B, C, Tz, Hz, Wz]` of any length and size and return frames in [-1, 1] (clamped).
Streaming: the first step takes `latents` and returns `frames` and `future_*`; each next step takes
`latents` and those caches as `past_*`, and returns the same again.
The files appear only after onnxruntime has reproduced PyTorch's frames with them: within `TOLERANCES`, or, for decoders
that magnify rounding, within a few times what rounding does to PyTorch's own (`parity.ROUNDING_FACTOR`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import onnxruntime
import torch

from flashvaed_cli.atomic import draft_folder
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.graphs import (
    TRACE_BATCH,
    TRACE_GRID,
    ClipGraph,
    StepGraph,
    cache_name,
    check_grid,
    clip_notes,
    first_caches,
    trace_grid,
    traceable_copy,
)
from flashvaed_cli.export.onnx_check import OnnxDecoder, alternating_ms
from flashvaed_cli.export.onnx_trace import label_model, trace_graph, without_caches
from flashvaed_cli.export.onnx_weights import SharedWeights
from flashvaed_cli.export.parity import (
    copy_in,
    own_rounding,
    relative_difference,
    require_parity,
    seeded_latents,
)
from flashvaed_cli.export.result import ExportResult
from flashvaed_cli.progress import Progress, SilentProgress, Task

MIN_OPSET = 18  # the oldest that torch's exporter writes natively
# float32: the two runtimes sum in different orders. float16: 11 bits, over some forty layers.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
_ADVICE = "Use another target"
# Batch, (latent frames, height, width), and the chunks of a streaming check: near the traced size, another, smallest.
CHECKS = ((2, TRACE_GRID, (2, 1)), (1, (4, 4, 7), (1, 1, 2)), (3, (1, 3, 2), (1,)))
GraphKind = Literal["clip", "step"]
GraphName = Literal["clip", "step.first", "step.next"]
_GRAPHS: dict[GraphKind, tuple[GraphName, ...]] = {"clip": ("clip",), "step": ("step.first", "step.next")}


@dataclass(frozen=True)
class OnnxOptions:
    """How to export and check.

    `dtype` is float32 or float16 (weights, latents, caches and frames). `latent_mean` and `latent_std`
    (raw = normalized * std + mean) scale the latents of the check and are written into the file.
    `speed_grid`, latent frames, height and width: also time onnxruntime against PyTorch.
    """

    dtype: torch.dtype = torch.float32
    opset: int = MIN_OPSET
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    seed: int = 0
    speed_grid: tuple[int, int, int] | None = None


def export_onnx(
    decoder: Decoder,
    path: Path,
    *,
    options: OnnxOptions | None = None,
    kinds: tuple[GraphKind, ...] = ("clip", "step"),
    metadata: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> list[ExportResult]:
    """Write graphs of a decoder with their weights in one file, `NAME.onnx.data`.

    `clip` is one graph, `NAME.onnx`: latents of a whole clip to all its frames. `step` is two, `NAME.step.first.onnx`
    and `NAME.step.next.onnx`: some latents to their frames, with explicit caches.

    Args:
        path: `NAME.onnx`; the other files are its siblings.
        metadata: added to the JSON that the graphs carry under the key `flashvaed`.
    Returns:
        A result for each kind; the data file counts towards the first.
    Raises:
        ExportError: the options or the decoder do not fit ONNX, or onnxruntime does not reproduce its frames. No file
            is written then.
    """
    options = options or OnnxOptions()
    _require_exportable(options)
    names: list[GraphName] = [name for kind in kinds for name in _GRAPHS[kind]]
    total = len(names) + len(kinds)
    with (progress or SilentProgress()).task("ONNX", total=total) as task, draft_folder(path) as draft:
        data = draft / f"{path.name}.data"
        files = {name: draft / _file_name(path, name) for name in names}
        with SharedWeights(data) as weights:
            for name, model in _models(decoder, kinds, options, metadata or {}, task):
                weights.move_from(model)
                ir.save(model, files[name])
                task.advance()
        results: list[ExportResult] = []
        for kind in kinds:
            task.advance(0, now=f"checking {kind}")
            listed = [files[name] for name in _GRAPHS[kind]]
            result = _checked(decoder, OnnxDecoder(*listed), options, kind, path.name)
            listed += [] if results else [data]
            size_bytes = sum(file.stat().st_size for file in listed)
            paths = tuple(path.with_name(file.name) for file in listed)
            results.append(replace(result, paths=paths, size_bytes=size_bytes))
            task.advance()
        for file in (data, *files.values()):
            file.replace(path.with_name(file.name))
    return results


def _models(
    decoder: Decoder,
    kinds: tuple[GraphKind, ...],
    options: OnnxOptions,
    metadata: Mapping[str, object],
    task: Task,
) -> Iterator[tuple[GraphName, ir.Model]]:
    """The graphs of each kind, labelled, each to be saved before the next is asked for.

    Tracing takes most of an export's time, so that a whole-clip graph is not traced where its step graph was: it is
    the first step without the caches that it gives.
    """
    traceable = traceable_copy(decoder, options.dtype)
    latents = _latents(decoder, trace_grid(decoder.spec), options, batch=TRACE_BATCH)

    def labelled(model: ir.Model, kind: GraphKind, **described: object) -> ir.Model:
        label_model(model, {**_describe(decoder, options, kind), **metadata, **described})
        return model

    if "step" not in kinds:
        task.advance(0, now="tracing clip")
        yield "clip", labelled(trace_graph(ClipGraph(traceable), [latents], opset=options.opset), "clip")
        return
    caches = first_caches(traceable, latents)
    step = StepGraph(traceable, tuple(caches))
    named = {cache_name(address): address for address in caches}
    task.advance(0, now="tracing step.first")
    first = trace_graph(step, [latents], opset=options.opset)
    yield "step.first", labelled(first, "step", caches=named, step="first")
    if "clip" in kinds:
        yield "clip", labelled(without_caches(first), "clip")
    del first
    task.advance(0, now="tracing step.next")
    following = trace_graph(step, [latents, *caches.values()], opset=options.opset)
    yield "step.next", labelled(following, "step", caches=named, step="next")


def _file_name(path: Path, name: str) -> str:
    return path.name if name == "clip" else f"{path.stem}.{name}{path.suffix}"


def _require_exportable(options: OnnxOptions) -> None:
    if options.dtype not in TOLERANCES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise ExportError(f"ONNX export knows {known}, not {str(options.dtype).removeprefix('torch.')}")
    if options.opset < MIN_OPSET:
        raise ExportError(f"torch's ONNX exporter writes opset {MIN_OPSET} or higher, not {options.opset}")


def _describe(decoder: Decoder, options: OnnxOptions, kind: GraphKind) -> dict[str, object]:
    return {
        "kind": f"onnx-{kind}",
        "family": decoder.spec.family,
        "latent_scale": "raw",
        "latent_mean": options.latent_mean,
        "latent_std": options.latent_std,
        "frames_range": [-1, 1],
        "temporal_factor": decoder.spec.temporal_factor,
        "spatial_factor": decoder.spec.spatial_factor,
        "spec": decoder.spec.model_dump(mode="json"),
    }


def _latents(decoder: Decoder, grid: tuple[int, int, int], options: OnnxOptions, *, batch: int = 1) -> torch.Tensor:
    latents = seeded_latents(
        decoder.spec,
        grid,
        seed=options.seed,
        latent_mean=options.latent_mean,
        latent_std=options.latent_std,
        batch=batch,
    )
    return latents.to(options.dtype)


@torch.no_grad()
def _checked(decoder: Decoder, exported: OnnxDecoder, options: OnnxOptions, kind: GraphKind, name: str) -> ExportResult:
    """Compare with the float32 decoder on the CPU at every size of `CHECKS`; measure if asked to. Names no files."""
    reference = copy_in(decoder, torch.float32)
    worst, allowed = 0.0, 0.0
    grids = [(batch, check_grid(decoder.spec, grid), chunks) for batch, grid, chunks in CHECKS]
    for batch, grid, chunks in grids:
        latents = _latents(decoder, grid, options, batch=batch).float()
        frames = exported.decode(latents, chunks if kind == "step" else None)
        difference = relative_difference(frames, decode(reference, latents))
        where = f"{name} ({kind}) in onnxruntime, latents {list(latents.shape)},"
        advice = "Export --dtype float32, or another target" if options.dtype == torch.float16 else _ADVICE
        rounding = partial(own_rounding, decoder, latents, options.dtype)
        tolerance = TOLERANCES[options.dtype]
        found = require_parity(difference, tolerance, where=where, rounding=rounding, advice=advice)
        worst, allowed = max(worst, difference), max(allowed, found)
    onnxruntime_ms, torch_ms = _measured(reference, exported, options, kind)
    sizes = ", ".join("x".join(map(str, (batch, *grid))) for batch, grid, _ in grids)
    return ExportResult(
        target="onnx-clip" if kind == "clip" else "onnx-step",
        paths=(),
        size_bytes=0,
        max_abs_difference=worst,
        tolerance=allowed,
        checked_with=f"onnxruntime {onnxruntime.__version__}",
        opset=options.opset,
        onnxruntime_ms=onnxruntime_ms,
        torch_ms=torch_ms,
        notes=(
            f"ONNX: raw latents [B, C, {'1' if decoder.spec.still else 'T'}, H, W] of any size to frames in [-1, 1]",
            f"ONNX: checked in onnxruntime against float32 PyTorch on batch and grid {sizes}",
            *(f"ONNX: {note}" for note in clip_notes(decoder.spec)),
        ),
    )


def _measured(
    reference: Decoder, exported: OnnxDecoder, options: OnnxOptions, kind: GraphKind
) -> tuple[float | None, float | None]:
    if options.speed_grid is None:
        return None, None
    latents = _latents(reference, options.speed_grid, options).float()
    chunk = 1 if kind == "step" else None
    chunks = None if chunk is None else [chunk] * latents.shape[2]
    return alternating_ms(lambda: exported.decode(latents, chunks), lambda: decode(reference, latents, chunk=chunk))
