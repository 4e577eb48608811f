"""The blocks of LeanVAE as data: gated layers over branches of the channels, the ISTA bottleneck, cells of pixels.

Their layers have paths as names (`branches.0.expand`), as their modules do. Every layer has a bias, which is zero if
the released weights have none. Imports no torch.

Reference: LeanVAE, arXiv 2503.14325.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flashvaed_cli.decoders.spec.block import Block, Grid, InnerTensor, Reader
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor, FrozenSpec
from flashvaed_cli.limits import MAX_STAGE_BLOCKS

CELL: Factor = (4, 8, 8)
"""Frames, rows and columns of pixels per latent; of the first frame (1, 8, 8)."""
PATCH: Factor = (2, 4, 4)
"""The same in each band of a cell's Haar transform; of the first frame (1, 4, 4)."""
COLOURS = 3
PARTS = ("low", "high")
_NUM_BANDS = {"video": {"low": 1, "high": 7}, "image": {"low": 1, "high": 3}}


def band_width(medium: str, part: str) -> int:
    """Values per cell in all low or all high bands, of a video or of its first frame (`image`)."""
    frames = PATCH[0] if medium == "video" else 1
    return COLOURS * _NUM_BANDS[medium][part] * frames * PATCH[1] * PATCH[2]


class BranchSpec(FrozenSpec):
    """Layer norm (eps 1e-5), `expand` to values and gates, values times gelu of the gates, `contract`."""

    expand: ConvSpec
    contract: ConvSpec

    @model_validator(mode="after")
    def _gates_fit(self) -> BranchSpec:
        if self.expand.out_width != 2 * self.contract.in_width:
            raise ValueError(f"{self.expand.out_width} values and gates do not make {self.contract.in_width} channels")
        if self.expand.in_width != self.contract.out_width:
            raise ValueError(f"a branch reads {self.expand.in_width} channels and outputs {self.contract.out_width}")
        return self

    @property
    def width(self) -> int:
        """Width of its input and of its output."""
        return self.expand.in_width


class NafSpec(Block):
    """`depthwise`, then on each branch of the channels a gated feed-forward layer; with `residual` each is added."""

    has_path_names: ClassVar[bool] = True

    kind: Literal["naf"] = "naf"
    depthwise: ConvSpec
    branches: Annotated[tuple[BranchSpec, ...], Field(min_length=1, max_length=4)]
    residual: bool = True

    @model_validator(mode="after")
    def _branches_fill_width(self) -> NafSpec:
        if self.depthwise.operator != "depthwise3d":
            raise ValueError(f"a naf block begins with a depthwise3d layer, not {self.depthwise.operator}")
        if sum(branch.width for branch in self.branches) != self.depthwise.out_width:
            raise ValueError(f"branches of {[b.width for b in self.branches]} channels, not {self.depthwise.out_width}")
        return self

    @property
    def layers(self) -> dict[str, ConvSpec]:
        """By their paths."""
        found = {"depthwise": self.depthwise}
        for index, branch in enumerate(self.branches):
            found |= {f"branches.{index}.expand": branch.expand, f"branches.{index}.contract": branch.contract}
        return found

    def with_layers(self, layers: Mapping[str, ConvSpec]) -> NafSpec:
        """A copy with other layers; checked."""
        found = {**self.layers, **layers}
        branches = tuple(
            BranchSpec(expand=found[f"branches.{index}.expand"], contract=found[f"branches.{index}.contract"])
            for index in range(len(self.branches))
        )
        return NafSpec(depthwise=found["depthwise"], branches=branches, residual=self.residual)

    @property
    def layer_norms(self) -> dict[str, int]:
        """One before each branch."""
        return {f"branches.{index}.norm": branch.width for index, branch in enumerate(self.branches)}

    @property
    def norm_parameters(self) -> int:
        """Gain and shift of every channel."""
        return 2 * self.depthwise.out_width

    @property
    def inner_tensors(self) -> dict[str, InnerTensor]:
        """The values after their gates."""
        found = {}
        for index, branch in enumerate(self.branches):
            group = "inner" if len(self.branches) == 1 else f"inner{index}"
            place = f"branches.{index}"
            found[f"{place}.gate"] = InnerTensor(
                group=group,
                width=branch.contract.in_width,
                producer=f"{place}.expand",
                reader=Reader(layer=f"{place}.contract"),
                gated=True,
            )
        return found

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Only `depthwise` sees neighbours."""
        return (("depthwise",),)

    @property
    def out_width(self) -> int:
        """That of all branches together."""
        return self.depthwise.out_width

    @property
    def widest_output(self) -> int:
        """Values and gates of the widest branch."""
        return max(self.out_width, *(branch.expand.out_width for branch in self.branches))

    @property
    def carries_input(self) -> bool:
        """If it is residual."""
        return self.residual

    @property
    def holds_channels(self) -> bool:
        """Because of norms over whole branches, and a depthwise layer."""
        return True


_Run = tuple[NafSpec, ...]


class IstaSpec(Block):
    """Inverts the map to the latents by K steps of learned iterative shrinkage: z `[d]` to p `[width]`.

    p = `start` z; then K times r = p - step * measureᵀ(measure p - z) and p = r + synthesis(shrink(analysis r)).
    `analysis` and `synthesis` hold a run of naf blocks for each step; each step has a step size and a threshold.
    """

    has_path_names: ClassVar[bool] = True

    kind: Literal["ista"] = "ista"
    start: ConvSpec
    measure: ConvSpec
    analysis: Annotated[tuple[_Run, ...], Field(min_length=1, max_length=MAX_STAGE_BLOCKS)]
    synthesis: Annotated[tuple[_Run, ...], Field(min_length=1, max_length=MAX_STAGE_BLOCKS)]

    @model_validator(mode="after")
    def _steps_fit(self) -> IstaSpec:
        if len(self.analysis) != len(self.synthesis):
            raise ValueError(f"{len(self.analysis)} steps of analysis, {len(self.synthesis)} of synthesis")
        if (self.start.in_width, self.start.out_width) != (self.measure.out_width, self.measure.in_width):
            raise ValueError("the widths of start must be those of measure, swapped")
        if any(unit.in_width != self.out_width for unit in self.units.values()):
            raise ValueError(f"a step works on {self.out_width} channels")
        return self

    @property
    def units(self) -> dict[str, NafSpec]:
        """The naf blocks by their paths, in forward order."""
        found = {}
        for step, runs in enumerate(zip(self.analysis, self.synthesis, strict=True)):
            for name, run in zip(("analysis", "synthesis"), runs, strict=True):
                found |= {f"{name}.{step}.{index}": unit for index, unit in enumerate(run)}
        return found

    @property
    def layers(self) -> dict[str, ConvSpec]:
        """By their paths."""
        found = {"start": self.start, "measure": self.measure}
        for place, unit in self.units.items():
            found |= {f"{place}.{name}": layer for name, layer in unit.layers.items()}
        return found

    def with_layers(self, layers: Mapping[str, ConvSpec]) -> IstaSpec:
        """A copy with other layers; checked."""
        found = {**self.layers, **layers}
        runs: dict[str, tuple[_Run, ...]] = {}
        for name, planned in (("analysis", self.analysis), ("synthesis", self.synthesis)):
            runs[name] = tuple(
                tuple(
                    unit.with_layers({layer: found[f"{name}.{step}.{index}.{layer}"] for layer in unit.layers})
                    for index, unit in enumerate(run)
                )
                for step, run in enumerate(planned)
            )
        return IstaSpec(
            start=found["start"], measure=found["measure"], analysis=runs["analysis"], synthesis=runs["synthesis"]
        )

    def num_uses(self, name: str) -> int:
        """`measure` is applied twice in every step, once transposed."""
        return 2 * len(self.analysis) if name == "measure" else 1

    @property
    def layer_norms(self) -> dict[str, int]:
        """Those of its naf blocks."""
        found = {}
        for place, unit in self.units.items():
            found |= {f"{place}.{name}": width for name, width in unit.layer_norms.items()}
        return found

    @property
    def norm_parameters(self) -> int:
        """Those of its naf blocks, and the step size and threshold of every step."""
        return 2 * len(self.analysis) + sum(unit.norm_parameters for unit in self.units.values())

    @property
    def inner_tensors(self) -> dict[str, InnerTensor]:
        """Those of its naf blocks."""
        found = {}
        for place, unit in self.units.items():
            for name, inner in unit.inner_tensors.items():
                found[f"{place}.{name}"] = InnerTensor(
                    group=f"{place}.{inner.group}",
                    width=inner.width,
                    producer=f"{place}.{inner.producer}",
                    reader=Reader(layer=f"{place}.{inner.reader.layer}"),
                    gated=inner.gated,
                )
        return found

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """All depthwise layers, one after another."""
        return (tuple(name for name in self.layers if name.endswith("depthwise")),)

    @property
    def out_width(self) -> int:
        """Of p."""
        return self.start.out_width

    @property
    def writers(self) -> tuple[str, ...]:
        """The last layer, and the first, whose output the steps carry on."""
        return (list(self.layers)[-1], "start")

    @property
    def holds_channels(self) -> bool:
        """Because every step carries all of them on."""
        return True


class _CellSpec(Block):
    """What stem and head share: a pointwise layer for low and high bands, of the first frame and of later cells."""

    has_path_names: ClassVar[bool] = True

    video_low: ConvSpec
    video_high: ConvSpec
    image_low: ConvSpec
    image_high: ConvSpec

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """No layer sees neighbours."""
        return ((),)

    @property
    def holds_channels(self) -> bool:
        """Because low and high ones are read by different layers."""
        return True


class CellStemSpec(_CellSpec):
    """Pixels `[B, 3, 1 + 4n, 8h, 8w]` to the Haar bands of their cells, and those to channels `[B, C, 1 + n, h, w]`."""

    kind: Literal["cell_stem"] = "cell_stem"

    @property
    def in_width(self) -> int:
        """Colours."""
        return COLOURS

    @property
    def out_width(self) -> int:
        """Low and high channels."""
        return self.video_low.out_width + self.video_high.out_width

    @property
    def shrinkage(self) -> Factor:
        """A cell."""
        return CELL

    @property
    def widest_output(self) -> int:
        """The pixels of a cell, in order."""
        return COLOURS * CELL[0] * CELL[1] * CELL[2]

    @property
    def readers(self) -> tuple[Reader, ...]:
        """All layers."""
        return tuple(Reader(layer=name) for name in self.layers)

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """The first frame has its own layers."""
        frames, height, width = self.grid_after(grid)
        return (1 if name.startswith("image") else frames - 1, height, width)


class CellHeadSpec(_CellSpec):
    """`[B, C, 1 + n, h, w]` through the layers to Haar bands, and those to pixels `[B, 3, 1 + 4n, 8h, 8w]`."""

    kind: Literal["cell_head"] = "cell_head"

    @property
    def in_width(self) -> int:
        """Low and high channels."""
        return self.video_low.in_width + self.video_high.in_width

    @property
    def out_width(self) -> int:
        """Colours."""
        return COLOURS

    @property
    def widest_output(self) -> int:
        """At the size of the pixels."""
        return COLOURS

    @property
    def growth(self) -> Factor:
        """A cell."""
        return CELL

    @property
    def readers(self) -> tuple[Reader, ...]:
        """All layers."""
        return tuple(Reader(layer=name) for name in self.layers)

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """The first frame has its own layers."""
        return (1 if name.startswith("image") else grid[0] - 1, *grid[1:])


def inner_width(width: int) -> int:
    """Inner width of a branch of `width` channels: two thirds of four times that, rounded down."""
    return int(4 * (2 / 3) * width)


def naf_spec(*widths: int, residual: bool = True) -> NafSpec:
    """A naf block with branches of the given widths."""
    width = sum(widths)
    depthwise = ConvSpec(operator="depthwise3d", in_width=width, out_width=width, kernel=(3, 3, 3))
    branches = tuple(
        BranchSpec(expand=point_conv(one, 2 * inner_width(one)), contract=point_conv(inner_width(one), one))
        for one in widths
    )
    return NafSpec(depthwise=depthwise, branches=branches, residual=residual)


def cell_head_spec(low: int, high: int) -> CellHeadSpec:
    """The head after low and high branches of the given widths."""
    return CellHeadSpec(
        video_low=point_conv(low, band_width("video", "low")),
        video_high=point_conv(high, band_width("video", "high")),
        image_low=point_conv(low, band_width("image", "low")),
        image_high=point_conv(high, band_width("image", "high")),
    )


def cell_stem_spec(low: int, high: int) -> CellStemSpec:
    """The stem before low and high branches of the given widths."""
    return CellStemSpec(
        video_low=point_conv(band_width("video", "low"), low),
        video_high=point_conv(band_width("video", "high"), high),
        image_low=point_conv(band_width("image", "low"), low),
        image_high=point_conv(band_width("image", "high"), high),
    )
