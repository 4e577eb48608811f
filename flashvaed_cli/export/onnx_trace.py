"""Trace the graphs of a decoder to ONNX, and label what comes out."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize
from torch import Tensor

from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.graphs import ClipGraph, StepGraph, cache_name, dynamic_axes


def trace_graph(graph: ClipGraph | StepGraph, inputs: Sequence[Tensor], *, opset: int) -> ir.Model:
    """Trace with dynamic batch, latent frames, height and width (a single latent frame stays one).

    Args:
        inputs: latents of `trace_grid`, then the caches of a later step.
    Raises:
        ExportError: torch cannot express the decoder in this opset.
    """
    names = [cache_name(address) for address in graph.addresses] if isinstance(graph, StepGraph) else []
    try:
        with _silent():
            program = torch.onnx.export(
                graph.eval(),
                tuple(inputs),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["latents", *(f"past_{name}" for name in names)][: len(inputs)],
                output_names=["frames", *(f"future_{name}" for name in names)],
                dynamic_shapes=dynamic_axes(inputs),
            )
    except torch.onnx.OnnxExporterError as error:
        _raise_interrupt_behind(error)
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__} cannot express the decoder in ONNX opset {opset}: {reason}"
        ) from error
    assert program is not None
    return program.model


def _raise_interrupt_behind(error: BaseException) -> None:
    """Raise the Ctrl-C or SIGTERM that a library has made an error of its own."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, KeyboardInterrupt):
            raise behind
        behind = behind.__cause__ or behind.__context__


def without_caches(model: ir.Model) -> ir.Model:
    """The graph of a first step made that of a whole clip, in place: its frames alone, and what they need."""
    del model.graph.outputs[1:]
    with _silent():
        return optimize(model)


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what the exporter says: warnings about itself and about axes that share a name, and what older releases of
    onnxscript print, which would spoil the document of --json."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def label_model(model: ir.Model, metadata: Mapping[str, object]) -> None:
    """Replace the tracer's notes (which name local paths) by ours: JSON under the key `flashvaed`."""
    graph = model.graph
    for part in (model, graph, *graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.producer_name = "flashvaed"
    model.metadata_props["flashvaed"] = json.dumps(dict(metadata))
