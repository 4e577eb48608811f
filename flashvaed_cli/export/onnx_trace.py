"""Trace a decoder to ONNX: what the graphs take and give, and what their axes and caches are called.

A cache is named after the address of its layer with underscores for dots: layer `up0.1.conv1` reads
`past_up0_1_conv1` and gives `future_up0_1_conv1`. Axes are named too, those of the caches as multiples
of the latent's: `2*latent_height`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from flashvaed_cli.decoders.blocks import Upsample
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.layer_spec import UpsampleSpec
from flashvaed_cli.decoders.norms import ChannelRMSNorm
from flashvaed_cli.decoders.operators import Future, LowRankConv3d, Past, extend_with_past, pointwise_conv
from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.errors import ExportError

TRACE_GRID = (3, 5, 6)  # latent frames, height, width: unequal, so that no two axes are taken for one


def trace_grid(spec: DecoderSpec) -> tuple[int, int, int]:
    """Latent frames, height and width to trace a decoder with."""
    return (1, *TRACE_GRID[1:]) if spec.still else TRACE_GRID


class _AnyLengthUpsample(Upsample):
    """The same frames without a branch on the number of latents, so that one graph serves 1 and more."""

    def double_frames(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B C Td H W"]:
        if past is not None:
            return super().double_frames(x, past, future)
        first = x[:, :, :1]
        unseen = torch.cat([torch.zeros_like(first), x[:, :, 1:]], dim=2)  # what precedes a clip is zero too
        doubled = self.temporal(unseen, None, future).chunk(2, dim=1)  # type: ignore[misc]
        rest = torch.stack(doubled, dim=3).flatten(2, 3)[:, :, 2:]  # [B, C, 2 (T - 1), H, W]
        return torch.cat([first, rest], dim=2)


class _AnyLengthLowRank(LowRankConv3d):
    """The same frames by a window of past and present ones: the sum over taps branches on how many there are."""

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        window = extend_with_past(x, self.spec.kernel[0] - 1, self.address, past, future)
        return pointwise_conv(F.conv3d(window, self.reduce), self.weight, self.bias)


class _KeptEpsNorm(ChannelRMSNorm):
    """The same norm with the sum in multiples of its eps.

    torch's ONNX optimiser takes a summand of 1e-8 for zero and drops it: a vector of zeros then becomes NaN, and a
    short one too long.
    """

    def _unit(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        eps = self.spec.eps
        assert eps is not None
        return x * (torch.rsqrt(x.square().mean(1, keepdim=True) / eps + 1) * eps**-0.5)


class ClipGraph(nn.Module):
    """Raw latents of a whole clip to its frames in [-1, 1]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Float[Tensor, "B C Tz Hz Wz"]) -> Float[Tensor, "B 3 F H W"]:
        return self.decoder(latents).clamp(-1.0, 1.0)


class StepGraph(nn.Module):
    """One chunk of raw latents, and the caches unless it is the first, to its frames and the caches for the next."""

    def __init__(self, decoder: Decoder, addresses: tuple[str, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.addresses = addresses

    def forward(self, latents: Float[Tensor, "B C Tz Hz Wz"], *caches: Tensor) -> tuple[Tensor, ...]:
        past = dict(zip(self.addresses, caches, strict=True)) if caches else None
        future: dict[str, Tensor] = {}
        frames = self.decoder(latents, past, future)
        return frames.clamp(-1.0, 1.0), *(future[address] for address in self.addresses)


def traceable_copy(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy on the CPU in `dtype`, for inference, whose graph fits clips of any length and keeps every eps."""
    traceable = copy.deepcopy(decoder).to("cpu", dtype).eval().requires_grad_(False)
    for address, block in decoder.spec.blocks():
        if isinstance(block, UpsampleSpec) and block.temporal is not None:
            stage, index = address.split(".")
            original = traceable.at(address)
            replacement = _AnyLengthUpsample(block, address)
            replacement.load_state_dict(original.state_dict())
            traceable.stages[stage][int(index)] = replacement.to(dtype).eval().requires_grad_(False)  # type: ignore[index]
    for parent in list(traceable.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LowRankConv3d):
                replacement = _AnyLengthLowRank(layer.spec, layer.address)
            elif isinstance(layer, ChannelRMSNorm) and layer.spec.eps is not None:
                replacement = _KeptEpsNorm(layer.width, layer.spec)
            else:
                continue
            replacement.load_state_dict(layer.state_dict())
            setattr(parent, name, replacement.to(dtype).eval().requires_grad_(False))
    return traceable


def cache_name(address: str) -> str:
    """The part of a cache's name after `past_` or `future_`."""
    return address.replace(".", "_")


def trace_graph(graph: ClipGraph | StepGraph, inputs: Sequence[Tensor], *, opset: int) -> torch.onnx.ONNXProgram:
    """Trace with dynamic latent frames, height and width (the batch is 1; a single latent frame stays one).

    Args:
        inputs: latents of `trace_grid`, then the caches of a later step.
    Raises:
        ExportError: torch cannot express the decoder in this opset.
    """
    names = [cache_name(address) for address in graph.addresses] if isinstance(graph, StepGraph) else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about itself and about axes that share a name
            program = torch.onnx.export(
                graph.eval(),
                tuple(inputs),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["latents", *(f"past_{name}" for name in names)][: len(inputs)],
                output_names=["frames", *(f"future_{name}" for name in names)],
                dynamic_shapes=_dynamic_axes(inputs),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__} cannot express the decoder in ONNX opset {opset}: {reason}"
        ) from error
    assert program is not None
    return program


def label_program(program: torch.onnx.ONNXProgram, metadata: Mapping[str, object]) -> None:
    """Replace the tracer's notes (which name local paths) by ours: JSON under the key `flashvaed`."""
    model = program.model
    graph = model.graph
    for part in (model, graph, *graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.producer_name = "flashvaed"
    model.metadata_props["flashvaed"] = json.dumps(dict(metadata))


def _dynamic_axes(inputs: Sequence[Tensor]) -> tuple[object, ...]:
    frames, height, width = Dim("latent_frames"), Dim("latent_height"), Dim("latent_width")
    axes: list[dict[int, object]] = [{2: frames, 3: height, 4: width}]
    if inputs[0].shape[2] == 1:
        del axes[0][2]
    for cache in inputs[1:]:
        scale = cache.shape[3] // TRACE_GRID[1]
        axes.append({3: height if scale == 1 else scale * height, 4: width if scale == 1 else scale * width})
    return (axes[0], tuple(axes[1:])) if axes[1:] else (axes[0],)
