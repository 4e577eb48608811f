"""How a program names the tensors of a family, as data: the place of every block, the name of every layer inside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Role = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Layout:
    """One way of naming the tensors of a family.

    Attributes:
        places: per role, block address to the foreign name of the block (two blocks may share one); that of a
            stage's bypass is `STAGE.bypass`.
        layers: per kind of block, our layer name to the foreign name inside the block ("": the block itself).
        config_class: `_class_name` of the configuration that comes with such weights; None if none does.
        gain: what a norm's gain is called; its shift is its `bias`.
        by_blocks: no name is common to all variants; the layout is told by where its blocks lie.
        is_shifted: of a layout told by its blocks: the norms have shifts, or the tensors that these are made of.
        prepare: makes tensors as found, with the configuration, into those that this layout names.
        implied: what the names of a file say beyond its configuration, as keys of one.
        finish: the way back, for files that other programs are to read.
        statistics: what the latents' mean and deviation are called, where they stand among the weights.
        variance_eps: the second of `statistics` is a variance, and the deviation the root of it plus this; None: it is
            the deviation itself.
        other_statistics: further names that they have in some files, means and deviations.
        prefix: of all names in the program's own files.
        denied: what shapes and configuration say against it, of a layout whose names are another's too; None: nothing.
        statistics_config: latent mean and deviation as keys of its class's configuration, where these are others than
            `latents_mean` and `latents_std`.
        model: what messages call a model of these names, of whatever version; "" if no name tells it.
        model_names: names that tell it.
        condition: names of what a norm's gain and shift are conditioned on.
        landmarks: by role, names that every variant has, where they are not those of norms and resamplers.
        arguments: what the constructor of `config_class` takes, of the keys that the family knows.
        settings: values of those that the class has under a key of another class too.
    """

    name: str
    family: str
    places: Mapping[Role, Mapping[str, str]]
    layers: Mapping[str, Mapping[str, str]]
    config_class: str | None = None
    gain: str = "gamma"
    by_blocks: bool = False
    is_shifted: bool = False
    prepare: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None
    implied: Callable[[Iterable[str]], dict[str, Any]] | None = None
    finish: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    statistics: tuple[str, str] | None = None
    variance_eps: float | None = None
    other_statistics: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    denied: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], str | None] | None = None
    statistics_config: Callable[[Sequence[float], Sequence[float]], dict[str, Any]] | None = None
    model: str = ""
    model_names: re.Pattern[str] | None = None
    condition: re.Pattern[str] | None = None
    landmarks: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def layer_place(self, role: Role, address: str, kind: str, layer: str) -> str:
        """The foreign name of a layer, less `.weight`."""
        place, name = self.places[role][address], self.layers[kind][layer]
        return f"{place}.{name}" if name else place
