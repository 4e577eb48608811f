"""The blocks of LeanVAE: gated layers over branches of the channels, the ISTA bottleneck, cells of pixels.

Every block maps `(x, past, future)` to `y`, with the streaming contract of `operators.py`. The first chunk of a video
(`past` is None) begins with a cell of one frame, which has layers of its own.

Reference: LeanVAE, arXiv 2503.14325.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import Future, Past
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm
from flashvaed_cli.decoders.modules.operators import build_conv, pointwise_conv
from flashvaed_cli.decoders.modules.shuffle_blocks import cells_to_channels, channels_to_cells
from flashvaed_cli.decoders.spec.layers import Factor
from flashvaed_cli.decoders.spec.naf_blocks import (
    CELL,
    COLOURS,
    PATCH,
    BranchSpec,
    CellHeadSpec,
    CellStemSpec,
    IstaSpec,
    NafSpec,
)

NAF_EPS = 1e-5
START_THRESHOLD = 0.01
Clip = Float[Tensor, "B C T H W"]
MappedClip = Float[Tensor, "B O To Ho Wo"]


class Gate(nn.Module):
    """`[B, 2I, T, H, W]` to `[B, I, T, H, W]`: the first half times the (exact) gelu of the second."""

    def forward(self, x: Clip) -> MappedClip:
        values, gates = x.chunk(2, dim=1)
        return values * F.gelu(gates)


class Branch(nn.Module):
    """Layer norm, `expand`, gate, `contract`."""

    def __init__(self, spec: BranchSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.address = address
        self.norm = ChannelLayerNorm(spec.width, NAF_EPS)
        self.expand = build_conv(spec.expand, f"{address}.expand")
        self.gate = Gate()
        self.contract = build_conv(spec.contract, f"{address}.contract")

    def inner(self, x: Clip) -> MappedClip:
        """The input of `contract`."""
        return self.gate(self.expand(self.norm(x)))

    def forward(self, x: Clip) -> Clip:
        return self.contract(self.inner(x))


class Naf(nn.Module):
    """A depthwise layer, then a gated one on each branch of the channels; residual, or not."""

    def __init__(self, spec: NafSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.depthwise = build_conv(spec.depthwise, f"{address}.depthwise")
        self.branches = nn.ModuleList(
            Branch(branch, f"{address}.branches.{index}") for index, branch in enumerate(spec.branches)
        )

    def mixed(self, x: Clip, past: Past = None, future: Future = None) -> Clip:
        """The input of the branches."""
        y = self.depthwise(x, past, future)
        return x + y if self.spec.residual else y

    def parts(self, x: Clip) -> tuple[Tensor, ...]:
        """The channels of each branch."""
        return x.split([branch.width for branch in self.spec.branches], dim=1)

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> Clip:
        x = self.mixed(x, past, future)
        given = [branch(part) for branch, part in zip(self.branches, self.parts(x), strict=True)]
        y = given[0] if len(given) == 1 else torch.cat(given, dim=1)
        return x + y if self.spec.residual else y


def branches_of(block: nn.Module) -> list[Branch]:
    """The branches of a naf block, or of all naf blocks inside another block, in forward order."""
    return [part for part in block.modules() if isinstance(part, Branch)]


class Ista(nn.Module):
    """Latents to features by K unrolled steps of iterative shrinkage."""

    def __init__(self, spec: IstaSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.start = build_conv(spec.start, f"{address}.start")
        self.measure = build_conv(spec.measure, f"{address}.measure")
        self.analysis, self.synthesis = (
            nn.ModuleList(
                nn.ModuleList(Naf(unit, f"{address}.{name}.{step}.{i}") for i, unit in enumerate(run))
                for step, run in enumerate(runs)
            )
            for name, runs in (("analysis", spec.analysis), ("synthesis", spec.synthesis))
        )
        self.steps = nn.Parameter(torch.ones(len(spec.analysis)))
        self.thresholds = nn.Parameter(torch.full((len(spec.analysis),), START_THRESHOLD))

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        given = x
        for passed in self.walk(x, past, future):
            given = passed[-1]
            del passed  # else the unit's input would live while the next one runs
        return given

    def walk(
        self, x: Clip, past: Past = None, future: Future = None
    ) -> Iterator[tuple[str, Float[Tensor, "B C T H W"], Float[Tensor, "B C T H W"]]]:
        """Yields every naf block's path, input and output; for the last of a step, the output after the step's sum."""
        y = self.start(x)
        back = self.measure.weight.T
        no_bias = back.new_zeros(len(back))
        for step in range(len(self.spec.analysis)):
            y = r = y - self.steps[step] * pointwise_conv(self.measure(y) - x, back, no_bias)
            for name, runs in (("analysis", self.analysis), ("synthesis", self.synthesis)):
                run = runs[step]
                assert isinstance(run, nn.ModuleList)
                for index, unit in enumerate(run):
                    entering, y = y, unit(y, past, future)
                    if name == "synthesis" and index + 1 == len(run):
                        y = r + y
                    yield f"{name}.{step}.{index}", entering, y
                    del entering
                if name == "analysis":
                    y = y.sign() * F.relu(y.abs() - self.thresholds[step])


def haar_bands(cells: Float[Tensor, "B C T H W"], factor: Factor) -> MappedClip:
    """Pixels of cells as channels, `[B, 3 ft fh fw, T, H, W]`, to `[B, bands * 3 * patch, T, H, W]`.

    A band is a sum (0) or difference (1) of neighbours along each axis, not normalised; bands in the order time,
    height, width, or, of single frames, width, height.
    """
    axes = _halved(factor)
    x = cells.unflatten(1, (COLOURS, factor[0] // axes[0], axes[0], factor[1] // 2, 2, factor[2] // 2, 2))
    for axis in (3, 5, 7):
        if x.shape[axis] == 2:
            even, odd = x.unbind(axis)
            x = torch.stack([even + odd, even - odd], dim=axis)
    order = (3, 5, 7) if axes[0] == 2 else (3, 7, 5)
    return x.permute(0, *order, 1, 2, 4, 6, 8, 9, 10).flatten(1, 7)


def haar_cells(x: Float[Tensor, "B C T H W"], factor: Factor) -> MappedClip:
    """Undo `haar_bands`."""
    axes = _halved(factor)
    patch = (COLOURS, factor[0] // axes[0], factor[1] // 2, factor[2] // 2)
    x = x.unflatten(1, (*axes, *patch))  # [B, dt, dh, dw, 3, pt, ph, pw, T, H, W]
    if axes[0] == 1:
        x = x.transpose(2, 3)
    for axis in (1, 2, 3):
        if x.shape[axis] == 2:
            total, difference = x.unbind(axis)
            x = torch.stack([total + difference, total - difference], dim=axis)
    x = x.permute(0, 4, 5, 1, 6, 2, 7, 3, 8, 9, 10).flatten(1, 7)
    return x / (axes[0] * axes[1] * axes[2])


def _halved(factor: Factor) -> Factor:
    """The factor by which a Haar transform divides each axis of a cell."""
    return (1 if factor[0] == 1 else 2, 2, 2)


_IMAGE_CELL: Factor = (1, CELL[1], CELL[2])
assert (2 * PATCH[0], 2 * PATCH[1], 2 * PATCH[2]) == CELL


class _CellBlock(nn.Module):
    """The layers that stem and head share."""

    def __init__(self, spec: CellStemSpec | CellHeadSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        for name, layer in spec.layers.items():
            setattr(self, name, build_conv(layer, f"{address}.{name}"))

    def mapped(self, x: Clip, medium: str) -> MappedClip:
        """Low and high channels through the layers of a video, or of the first frame (`image`)."""
        layers = [self.get_submodule(f"{medium}_{part}") for part in ("low", "high")]
        width = self.spec.layers[f"{medium}_low"].in_width
        return torch.cat([layers[0](x[:, :width]), layers[1](x[:, width:])], dim=1)


class CellStem(_CellBlock):
    """Cells of pixels to channels; keeps no state."""

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        found = []
        if past is None:
            found.append(self._of(x[:, :, :1], _IMAGE_CELL, "image"))
            x = x[:, :, 1:]
        if x.shape[2]:
            found.append(self._of(x, CELL, "video"))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _of(self, x: Clip, factor: Factor, medium: str) -> MappedClip:
        return self.mapped(haar_bands(cells_to_channels(x, factor), factor), medium)


class CellHead(_CellBlock):
    """Channels to cells of pixels; keeps no state."""

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        if past is not None:
            return self._of(x, CELL, "video")
        first = self._of(x[:, :, :1], _IMAGE_CELL, "image")
        if torch.compiler.is_exporting():  # a graph for one latent and more: no layer may meet none
            return torch.cat([first, self._of(x, CELL, "video")[:, :, CELL[0] :]], dim=2)
        return first if x.shape[2] == 1 else torch.cat([first, self._of(x[:, :, 1:], CELL, "video")], dim=2)

    def _of(self, x: Clip, factor: Factor, medium: str) -> MappedClip:
        return channels_to_cells(haar_cells(self.mapped(x, medium), factor), factor)
