"""The decoder as ONNX: one graph for whole clips, or two for streaming with the caches in the open.

Both take raw latents `[1, C, Tz, Hz, Wz]` of any length and size and give frames in [-1, 1] (clamped).
Streaming: the first step takes `latents` and gives `frames` and `future_*`; each next step takes
`latents` and those caches as `past_*`, and gives the same again.
A file appears only after onnxruntime has reproduced PyTorch's frames with it: within `TOLERANCES`, or, for decoders
that magnify rounding, within a few times what rounding does to PyTorch's own (`parity.ROUNDING_FACTOR`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.onnx_check import OnnxDecoder, alternating_ms
from flashvaed_cli.export.onnx_trace import (
    TRACE_GRID,
    ClipGraph,
    StepGraph,
    cache_name,
    label_program,
    trace_graph,
    trace_grid,
    traceable_copy,
)
from flashvaed_cli.export.parity import (
    copy_in,
    own_rounding,
    relative_difference,
    require_parity,
    seeded_latents,
)
from flashvaed_cli.export.result import ExportResult, Target
from flashvaed_cli.progress import Progress, SilentProgress

MIN_OPSET = 18  # the oldest that torch's exporter writes by itself
MAX_SINGLE_FILE_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the rest is for the graph
# float32: the two runtimes add in other orders. float16: its 11 bits, over some forty layers.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
# (latent frames, height, width) and the chunks of a streaming check: the traced size, another, a single latent.
_ADVICE = "Use another target"
CHECKS = ((TRACE_GRID, (2, 1)), ((4, 4, 7), (1, 1, 2)), ((1, 3, 2), (1,)))


@dataclass(frozen=True)
class OnnxOptions:
    """How to export and check.

    `dtype` is float32 or float16 (weights, latents, caches and frames). `latent_mean` and `latent_std`
    (raw = normalized * std + mean) scale the latents of the check and are written into the file.
    `speed_grid`, latent frames, height and width, asks for the time of onnxruntime beside PyTorch's.
    """

    dtype: torch.dtype = torch.float32
    opset: int = MIN_OPSET
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    seed: int = 0
    speed_grid: tuple[int, int, int] | None = None


def export_onnx_clip(
    decoder: Decoder,
    path: Path,
    *,
    options: OnnxOptions | None = None,
    metadata: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write one graph: latents of a whole clip to all its frames.

    Args:
        metadata: added to the JSON that the file carries under the key `flashvaed`.
    Raises:
        ExportError: the options or the decoder do not fit ONNX, or onnxruntime does not reproduce its frames.
    """
    options = options or OnnxOptions()
    _require_exportable(decoder, options)
    traceable = traceable_copy(decoder, options.dtype)
    with (progress or SilentProgress()).task("ONNX: whole clip", total=2) as task, atomic_path(path) as draft:
        program = trace_graph(
            ClipGraph(traceable), [_latents(decoder, trace_grid(decoder.spec), options)], opset=options.opset
        )
        label_program(program, {**_describe(decoder, options, "clip"), **(metadata or {})})
        program.save(draft, external_data=False)
        del program
        task.advance()
        result = _checked(decoder, OnnxDecoder(draft), (draft,), (path,), options, "onnx-clip")
        task.advance()
    return result


def export_onnx_step(
    decoder: Decoder,
    path: Path,
    *,
    options: OnnxOptions | None = None,
    metadata: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write two graphs, `NAME.first.onnx` and `NAME.next.onnx`: latents to frames, with explicit caches.

    Args:
        path: `NAME.onnx`; the two files are its siblings.
        metadata: added to the JSON that the files carry under the key `flashvaed`.
    Raises:
        ExportError: the options or the decoder do not fit ONNX, or onnxruntime does not reproduce its frames.
    """
    options = options or OnnxOptions()
    _require_exportable(decoder, options)
    traceable = traceable_copy(decoder, options.dtype)
    latents = _latents(decoder, TRACE_GRID, options)
    future: dict[str, torch.Tensor] = {}
    traceable(latents, None, future)
    addresses = tuple(future)
    graph = StepGraph(traceable, addresses)
    inputs = {"first": [latents], "next": [latents, *future.values()]}
    paths = tuple(path.with_name(f"{path.stem}.{step}{path.suffix}") for step in inputs)
    described = {**_describe(decoder, options, "step"), "caches": {cache_name(a): a for a in addresses}}
    with (progress or SilentProgress()).task("ONNX: streaming", total=3) as task, ExitStack() as stack:
        drafts = tuple(stack.enter_context(atomic_path(file)) for file in paths)
        for (step, given), draft in zip(inputs.items(), drafts, strict=True):
            program = trace_graph(graph, given, opset=options.opset)
            label_program(program, {**described, "step": step, **(metadata or {})})
            program.save(draft, external_data=False)
            del program
            task.advance()
        result = _checked(decoder, OnnxDecoder(*drafts), drafts, paths, options, "onnx-step")
        task.advance()
    return result


def _require_exportable(decoder: Decoder, options: OnnxOptions) -> None:
    if options.dtype not in TOLERANCES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise ExportError(f"ONNX export knows {known}, not {str(options.dtype).removeprefix('torch.')}")
    if options.opset < MIN_OPSET:
        raise ExportError(f"torch's ONNX exporter writes opset {MIN_OPSET} or higher, not {options.opset}")
    size_bytes = decoder.parameter_count * options.dtype.itemsize
    if size_bytes > MAX_SINGLE_FILE_BYTES:
        raise ExportError(
            f"the decoder has {size_bytes / 2**30:.1f} GiB of weights, an ONNX file holds less than 2: export float16"
        )


def _describe(decoder: Decoder, options: OnnxOptions, kind: str) -> dict[str, object]:
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


def _latents(decoder: Decoder, grid: tuple[int, int, int], options: OnnxOptions) -> torch.Tensor:
    latents = seeded_latents(
        decoder.spec, grid, seed=options.seed, latent_mean=options.latent_mean, latent_std=options.latent_std
    )
    return latents.to(options.dtype)


@torch.no_grad()
def _checked(
    decoder: Decoder,
    exported: OnnxDecoder,
    drafts: tuple[Path, ...],
    paths: tuple[Path, ...],
    options: OnnxOptions,
    target: Target,
) -> ExportResult:
    """Compare with the float32 decoder on the CPU at every size of `CHECKS`; measure if asked to."""
    reference = copy_in(decoder, torch.float32)
    worst, allowed = 0.0, 0.0
    grids = [((1 if decoder.spec.still else t, h, w), chunks) for (t, h, w), chunks in CHECKS]
    for grid, chunks in grids:
        latents = _latents(decoder, grid, options).float()
        frames = exported.decode(latents, chunks if target == "onnx-step" else None)
        difference = relative_difference(frames, decode(reference, latents))
        where = f"{paths[0].name} in onnxruntime, latents {list(latents.shape)},"
        advice = "Export --dtype float32, or another target" if options.dtype == torch.float16 else _ADVICE
        rounding = partial(own_rounding, decoder, latents, options.dtype)
        tolerance = TOLERANCES[options.dtype]
        found = require_parity(difference, tolerance, where=where, rounding=rounding, advice=advice)
        worst, allowed = max(worst, difference), max(allowed, found)
    onnxruntime_ms, torch_ms = _measured(reference, exported, options, target)
    sizes = ", ".join("x".join(map(str, grid)) for grid, _ in grids)
    return ExportResult(
        target=target,
        paths=paths,
        size_bytes=sum(draft.stat().st_size for draft in drafts),
        max_abs_difference=worst,
        tolerance=allowed,
        opset=options.opset,
        onnxruntime_ms=onnxruntime_ms,
        torch_ms=torch_ms,
        notes=(
            f"raw latents [1, C, {'1' if decoder.spec.still else 'T'}, H, W] of any size to frames in [-1, 1]",
            f"checked in onnxruntime against float32 PyTorch on latents {sizes}",
        ),
    )


def _measured(
    reference: Decoder, exported: OnnxDecoder, options: OnnxOptions, target: Target
) -> tuple[float | None, float | None]:
    if options.speed_grid is None:
        return None, None
    latents = _latents(reference, options.speed_grid, options).float()
    chunk = 1 if target == "onnx-step" else None
    chunks = None if chunk is None else [chunk] * latents.shape[2]
    return alternating_ms(lambda: exported.decode(latents, chunks), lambda: decode(reference, latents, chunk=chunk))
