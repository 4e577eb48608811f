"""The decoder as `torch.export` programs (`.pt2`), which PyTorch runs without flashvaed's code, or as packages that
AOTInductor has compiled for this machine's CPU or GPU.

Inputs and outputs are those of the ONNX graphs: a clip at once, or steps with their caches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from flashvaed_cli.atomic import draft_folder
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import require_compiler
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.graphs import (
    TRACE_BATCH,
    TRACE_GRID,
    ClipGraph,
    StepGraph,
    check_grid,
    clip_notes,
    dynamic_axes,
    first_caches,
    trace_grid,
    traceable_copy,
)
from flashvaed_cli.export.parity import copy_in, own_rounding, relative_difference, require_parity, seeded_latents
from flashvaed_cli.export.result import ExportResult, Target
from flashvaed_cli.progress import Progress, SilentProgress, Task

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
COMPILED_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""A compiler sums in another order."""
_CHECKS = ((2, TRACE_GRID), (1, (4, 4, 7)), (3, (1, 3, 2)))  # batch; latent frames, height, width
_CPU = torch.device("cpu")

Program = Callable[..., Any]


@torch.no_grad()
def export_pt2(
    decoder: Decoder,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `NAME.pt2`, whole clips, and for decoders that stream `NAME.step.first.pt2` and `NAME.step.next.pt2`.

    Raises:
        ExportError: torch cannot export the decoder, or it decodes differently when loaded again. No file is written.
    """
    with _task("pt2", decoder, progress) as task, draft_folder(path) as draft:
        files = []
        for suffix, program in _programs(decoder, path, dtype, _CPU, seed, task):
            files.append(draft / f"{path.stem}{suffix}.pt2")
            torch.export.save(program, files[-1])
            task.advance()
        task.advance(0, now="checking")
        loaded = [torch.export.load(file).module() for file in files]
        difference, allowed = _compared(decoder, loaded, dtype, _CPU, seed, path.name, TOLERANCES[dtype])
        task.advance()
        notes = tuple(f"pt2: {note}" for note in clip_notes(decoder.spec))
        return _moved("pt2", files, path.parent, difference, allowed, notes)


@torch.no_grad()
def export_aoti(
    decoder: Decoder,
    path: Path,
    *,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the programs of `export_pt2` compiled ahead of time: `NAME.aoti.pt2` and, for steps, two more.

    Args:
        path: that of the first, `.../NAME.aoti.pt2`.
        device: what they are compiled for: this machine's CPU or GPU, and machines with the same instructions.
    Raises:
        DecodeError: there is no compiler here.
        ExportError: torch cannot export or compile the decoder, or it decodes differently when loaded. No file is
            written.
    """
    require_compiler(device)
    with _task("aoti", decoder, progress) as task, draft_folder(path) as draft:
        files = []
        for suffix, program in _programs(decoder, path, dtype, device, seed, task):
            files.append(draft / f"{path.name.removesuffix('.aoti.pt2')}{suffix}.aoti.pt2")
            task.advance(0, now=f"compiling {files[-1].name}")
            with _torch_speaks(f"compile the decoder to {files[-1].name}"):
                torch._inductor.aoti_compile_and_package(program, package_path=str(files[-1]))
            task.advance()
        task.advance(0, now="checking")
        loaded = [torch._inductor.aoti_load_package(str(file)) for file in files]
        tolerance = COMPILED_TOLERANCES[dtype]
        difference, allowed = _compared(decoder, loaded, dtype, device, seed, path.name, tolerance)
        task.advance()
        notes = (
            f"compiled for this machine's {device.type.upper()} by torch {torch.__version__}; others need a build of "
            "their own",
            *clip_notes(decoder.spec),
        )
        return _moved("aoti", files, path.parent, difference, allowed, tuple(f"aoti: {note}" for note in notes))


def _streams(decoder: Decoder) -> bool:
    spec = decoder.spec
    return spec.is_causal and not spec.still and not spec.grows_state


def _task(target: Target, decoder: Decoder, progress: Progress | None) -> AbstractContextManager[Task]:
    """One step for each program, and one for the check of all."""
    return (progress or SilentProgress()).task(target, total=4 if _streams(decoder) else 2)


def _programs(
    decoder: Decoder, path: Path, dtype: torch.dtype, device: torch.device, seed: int, task: Task
) -> Iterator[tuple[str, ExportedProgram]]:
    """The suffix of each program's name, and the program."""
    traceable = traceable_copy(decoder, dtype).to(device)
    latents = seeded_latents(decoder.spec, trace_grid(decoder.spec), seed=seed, batch=TRACE_BATCH).to(device, dtype)
    task.advance(0, now="tracing clip")
    yield "", _traced(ClipGraph(traceable), [latents], path.name)
    if _streams(decoder):
        caches = first_caches(traceable, latents)
        step = StepGraph(traceable, tuple(caches))
        task.advance(0, now="tracing step.first")
        yield ".step.first", _traced(step, [latents], path.name)
        task.advance(0, now="tracing step.next")
        yield ".step.next", _traced(step, [latents, *caches.values()], path.name)


def _traced(graph: ClipGraph | StepGraph, inputs: list[torch.Tensor], name: str) -> ExportedProgram:
    with _torch_speaks(f"export the decoder to {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        return torch.export.export(graph.eval(), tuple(inputs), dynamic_shapes=dynamic_axes(inputs), strict=False)


@contextmanager
def _torch_speaks(task: str) -> Iterator[None]:
    """Turn exceptions of torch's exporter and compiler, which share no base class, into one error with the reason."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"torch {torch.__version__} cannot {task}: {reason}") from error


def _moved(
    target: Target, files: Sequence[Path], folder: Path, difference: float, allowed: float, notes: tuple[str, ...]
) -> ExportResult:
    """The result, with its files moved out of the draft folder."""
    size_bytes = sum(file.stat().st_size for file in files)
    paths = tuple(file.replace(folder / file.name) for file in files)
    return ExportResult(target, paths, size_bytes, difference, allowed, f"torch {torch.__version__}", notes=notes)


def _compared(
    decoder: Decoder,
    programs: Sequence[Program],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    name: str,
    tolerance: float,
) -> tuple[float, float]:
    """The largest difference at every size, and what was allowed."""
    reference = copy_in(decoder, torch.float32).to(device)
    worst, allowed = 0.0, 0.0
    for batch, grid in _CHECKS:
        latents = seeded_latents(decoder.spec, check_grid(decoder.spec, grid), seed=seed, batch=batch).to(device)
        expected = decode(reference, latents)
        found = [programs[0](latents.to(dtype))]
        if len(programs) > 1:
            found.append(_in_steps(programs[1], programs[2], latents.to(dtype)))
        for frames in found:
            difference = relative_difference(frames.float(), expected)
            limit = require_parity(
                difference,
                tolerance,
                where=f"{name}, loaded again, latents {list(latents.shape)},",
                rounding=None if dtype == torch.bfloat16 else partial(own_rounding, decoder, latents, dtype),
            )
            worst, allowed = max(worst, difference), max(allowed, limit)
    return worst, allowed


def _in_steps(first: Program, following: Program, latents: torch.Tensor) -> torch.Tensor:
    """One latent frame a step."""
    parts = list(latents.split(1, dim=2))
    frames, *caches = first(parts[0])
    found = [frames]
    for part in parts[1:]:
        frames, *caches = following(part, *caches)
        found.append(frames)
    return torch.cat(found, dim=2)
