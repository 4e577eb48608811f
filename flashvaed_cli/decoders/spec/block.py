"""What every kind of block states about itself; `blocks.py` lists the kinds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, TypeVar, get_args

from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor, FrozenSpec, NormSpec, OmittingSpec
from flashvaed_cli.decoders.spec.operators import Grid

BlockT = TypeVar("BlockT", bound="Block")


class Reader(FrozenSpec):
    """A layer that reads a tensor: its name, and that of the norm before it."""

    layer: str
    norm: str | None = None


class InnerTensor(FrozenSpec):
    """A tensor inside a block whose channels can be pruned without any other block noticing.

    Attributes:
        group: name of its channel group, without the block's address.
        width: number of channels.
        producer: the layer whose output it is.
        reader: the layer that reads it.
        gated: the producer has two outputs per channel: first all values, then all gates.
    """

    group: str
    width: int
    producer: str
    reader: Reader
    gated: bool = False


class Block(OmittingSpec):
    """What every kind of block states about itself. The values here are those of a block with one convolution, `conv`.

    Attributes:
        has_path_names: its parts have paths as names, in its module and in every layout (`branches.0.expand`).
        has_still_form: it can become a block for single images, by its layers alone; see `variants/still.py`.
    """

    has_path_names: ClassVar[bool] = False
    has_still_form: ClassVar[bool] = False

    @classmethod
    @cache
    def convolution_fields(cls) -> tuple[str, ...]:
        """The fields that hold a convolution or None, in forward order."""
        fields = cls.model_fields.items()
        return tuple(name for name, field in fields if ConvSpec in (field.annotation, *get_args(field.annotation)))

    @property
    def layers(self) -> dict[str, ConvSpec]:
        """The convolutions by name, in forward order (attention projections excepted)."""
        named = {name: getattr(self, name) for name in self.convolution_fields()}
        return {name: layer for name, layer in named.items() if isinstance(layer, ConvSpec)}

    def with_layers(self: BlockT, layers: Mapping[str, ConvSpec]) -> BlockT:
        """A copy with other layers under the names of `layers`."""
        return self.model_copy(update=dict(layers))

    def num_uses(self, name: str) -> int:
        """How often a layer is evaluated at each of its positions."""
        return 1

    @property
    def norms(self) -> dict[str, tuple[NormSpec, int]]:
        """Its norms by name, each with its number of channels."""
        return {}

    @property
    def layer_norms(self) -> dict[str, int]:
        """Widths of the layer norms of a block that names its parts by paths; see `naf_blocks`."""
        return {}

    @property
    def group_fault(self) -> str | None:
        """Which GroupNorm has groups that do not divide its channels; None if none has. Blueprints may have some."""
        for name, (norm, width) in self.norms.items():
            if norm.groups is not None and width % norm.groups:
                return f"{name} cannot part {width} channels into {norm.groups} equal groups"
        return None

    @property
    def inner_tensors(self) -> dict[str, InnerTensor]:
        """The tensors inside the block that can be pruned, by the name of the module whose output they are."""
        return {}

    @property
    def holds_channels(self) -> bool:
        """Whether neither the channels that enter nor those that leave can be pruned."""
        return False

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The layers on each path from the block's input to its output."""
        return (tuple(self.layers),)

    @property
    def in_width(self) -> int:
        """Width of the block's input."""
        return next(iter(self.layers.values())).in_width

    @property
    def out_width(self) -> int:
        """Width of the block's output."""
        return list(self.layers.values())[-1].out_width

    @property
    def widest_output(self) -> int:
        """Width of the widest tensor at the output's size."""
        return max([self.out_width, *(layer.out_width for layer in self.layers.values())])

    @property
    def growth(self) -> Factor:
        """Frames (all but the first of the video), rows and columns that a block of a decoder makes of one."""
        return (1, 1, 1)

    @property
    def shrinkage(self) -> Factor:
        """Frames (all but the first of the video), rows and columns that a block of an encoder makes one."""
        return (1, 1, 1)

    @property
    def enlarges_first(self) -> bool:
        """Whether the input is enlarged before a layer reads it."""
        return False

    @property
    def norm_parameters(self) -> int:
        """Gains and shifts of its norms."""
        return sum(width * (norm.gain + norm.shift) for norm, width in self.norms.values())

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the layers whose sum is the output; an identity shortcut is not a layer."""
        return (list(self.layers)[-1],)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The layers that read the input."""
        return (Reader(layer=next(iter(self.layers))),)

    @property
    def carries_input(self) -> bool:
        """Whether an identity adds the input, or copies of it, to the output."""
        return False

    @property
    def keeps_channels(self) -> bool:
        """Whether input and output have the same channels, so that their kept channels are the same too."""
        return self.carries_input and self.growth == (1, 1, 1)

    @property
    def sees_whole_frames(self) -> bool:
        """Whether every position depends on its whole frame, as with GroupNorm: the block cannot run in tiles."""
        return any(norm.groups is not None for norm, _ in self.norms.values())

    @property
    def sees_whole_clip(self) -> bool:
        """Whether the output depends on all frames of the clip, so that the block cannot run in chunks."""
        return any(norm.over == "clip" for norm, _ in self.norms.values())

    @property
    def grows_state(self) -> bool:
        """Whether its state grows with the clip, so that no two steps have the same shapes."""
        return False

    @property
    def ends_stream(self) -> bool:
        """Whether, at the end of a stage, its output belongs to the next stage's channels."""
        return False

    def grid_after(self, grid: Grid) -> Grid:
        """The output's grid for an input of `grid`; the first frame of a video is neither doubled nor halved."""
        (t, h, w), growth, shrinkage = grid, self.growth, self.shrinkage
        frames = 1 + growth[0] * (t - 1) // shrinkage[0]
        return (frames, growth[1] * h // shrinkage[1], growth[2] * w // shrinkage[2])

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """The positions at which a layer is evaluated for an input of `grid`."""
        return self.grid_after(grid)

    def computed_layer(self, name: str, grid: Grid) -> tuple[ConvSpec, Grid]:
        """What is computed in place of a layer for an input of `grid`, and at which positions: the layer itself."""
        return self.layers[name], self.layer_grid(name, grid)
